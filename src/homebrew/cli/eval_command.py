"""`homebrew eval`: perplexity on a text, accuracy on HellaSwag."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import UseAppendAction, arg

from homebrew.cli.open_model import Dtype, SavedModel
from homebrew.data.text_paths import read_texts
from homebrew.errors import ConfigError, DataError

if TYPE_CHECKING:
    from homebrew.evaluation.hellaswag import Question
    from homebrew.evaluation.perplexity import ProgressFn


@dataclass(kw_only=True)
class Eval(SavedModel):
    """Evaluate a model: perplexity on a text, accuracy on HellaSwag, or both."""

    text: UseAppendAction[Annotated[tuple[Path, ...], arg(help_behavior_hint="(repeatable)")]] = ()
    """UTF-8 text file, or a folder of .txt and .md files. Prints the loss (nats per token), perplexity and bits per
    byte."""
    stride: Annotated[int | None, arg(help_behavior_hint="(default: half the block size)")] = None
    """Number of tokens between the starts of two text windows. A smaller stride gives each token more context."""
    hellaswag: Annotated[Literal["download"] | Path | None, arg(help_behavior_hint="")] = None
    """HellaSwag questions: "download" for the validation set, which is cached, or a hellaswag_val.jsonl file.
    Scored like build-nanogpt, which reports an accuracy of 0.2859 (normalized: 0.2955) for GPT-2 small."""
    limit: Annotated[int | None, arg(help_behavior_hint="(default: all)")] = None
    """Number of HellaSwag questions to use."""
    batch_size: int = 8
    """Number of windows or questions per forward pass."""
    dtype: Dtype = "float32"
    """Data type of the weights."""

    def run(self) -> None:
        """Run the command."""
        if not self.text and self.hellaswag is None:
            raise ConfigError("There is nothing to evaluate on. Pass --text, --hellaswag, or both.")
        if self.stride is not None and not self.text:
            raise ConfigError("--stride applies to a text. Pass --text, or remove --stride.")
        if self.limit is not None and self.hellaswag is None:
            raise ConfigError("--limit applies to HellaSwag. Pass --hellaswag, or remove --limit.")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"--limit {self.limit}: must be at least 1.")
        from homebrew.evaluation.hellaswag import score_hellaswag
        from homebrew.evaluation.perplexity import score_text

        # Read the inputs before the model, whose loading takes longer, so that errors come first.
        text = read_texts(self.text) if self.text else None
        questions = []
        if self.hellaswag is not None:
            questions = self._load_questions()
        model, tokenizer = self.open_model()
        if text is not None:
            text_score = score_text(
                model, tokenizer, text, stride=self.stride, batch_size=self.batch_size, progress=_progress_bar("text")
            )
            _print_metrics(
                loss=f"{text_score.loss:.4f}",
                perplexity=f"{text_score.perplexity:,.2f}",
                bits_per_byte=f"{text_score.bits_per_byte:.4f}",
                tokens=f"{text_score.num_tokens:,}",
            )
        if questions:
            score = score_hellaswag(
                model, tokenizer, questions, batch_size=self.batch_size, progress=_progress_bar("HellaSwag")
            )
            _print_metrics(
                hellaswag_accuracy=f"{score.accuracy:.4f}",
                hellaswag_accuracy_norm=f"{score.accuracy_norm:.4f}",
                hellaswag_questions=f"{score.num_questions:,}",
            )

    def _load_questions(self) -> "list[Question]":
        from homebrew.evaluation.hellaswag import load_hellaswag

        try:
            return load_hellaswag(None if self.hellaswag == "download" else self.hellaswag)[: self.limit]
        except DataError as error:
            raise DataError(f"--hellaswag {self.hellaswag}: {error}") from error


def _progress_bar(description: str) -> "ProgressFn":
    """Return a progress bar on standard error, shown only on a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)

    def progress(batches: Sequence[int]) -> Iterable[int]:
        return track(batches, description, console=console, transient=True) if console.is_terminal else batches

    return progress


def _print_metrics(**metrics: str) -> None:
    for name, value in metrics.items():
        print(f"{name.replace('_', ' '):24}{value}")
