"""`homebrew eval`."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from homebrew.cli.open_model import Dtype, open_model
from homebrew.data.text_file import read_text
from homebrew.errors import ConfigError

if TYPE_CHECKING:
    from homebrew.evaluation.perplexity import Track


@dataclass
class Eval:
    """Measure a model: how well it predicts a text, how well it ends HellaSwag's sentences.

    Perplexity is by strided windows: every token is predicted once, with at least block_size - stride tokens before
    it. HellaSwag is scored in the completion style of build-nanogpt, which reports 0.2859 and (normalised) 0.2955
    for GPT-2 small on all 10,042 questions.
    """

    checkpoint: Positional[Annotated[str, arg(metavar="CHECKPOINT")]]
    """A run's folder (its newest checkpoint), a checkpoint, a folder or hub repository in transformers' format, or an
    adapter's folder in PEFT's."""
    base: str | None = None
    """For an adapter, where its base is now, if not where it was trained on it."""
    text: Path | None = None
    """A UTF-8 text file: its loss (nats a token), perplexity and bits per byte."""
    stride: int | None = None
    """Tokens between two windows; half of the model's block size if not given."""
    hellaswag: Literal["download"] | Path | None = None
    """A file of HellaSwag's JSON lines (hellaswag_val.jsonl of github.com/rowanz/hellaswag); or "download", which
    keeps it in the cache."""
    limit: int | None = None
    """HellaSwag's first questions only."""
    batch_size: int = 8
    """Windows or questions at once."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; auto is the first accelerator there is."""
    dtype: Dtype = "float32"
    """Of the weights."""
    tokenizer: Literal["gpt2", "bytes"] | None = None
    """For a model that does not say which one it was trained with."""

    def run(self) -> None:
        """Do it."""
        if self.text is None and self.hellaswag is None:
            raise ConfigError("There is nothing to evaluate on: give --text, --hellaswag, or both.")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"--limit {self.limit}: must be at least 1.")
        from homebrew.evaluation.hellaswag import score_hellaswag
        from homebrew.evaluation.hellaswag_data import load_hellaswag
        from homebrew.evaluation.perplexity import score_text

        text = None if self.text is None else read_text(self.text)
        questions = []
        if self.hellaswag is not None:
            questions = load_hellaswag(None if self.hellaswag == "download" else self.hellaswag)[: self.limit]
        model, tokenizer = open_model(
            self.checkpoint, self.device, self.dtype, base=self.base, tokenizer=self.tokenizer
        )
        if text is not None:
            found = score_text(
                model, tokenizer, text, stride=self.stride, batch_size=self.batch_size, track=_track("text")
            )
            _report(
                loss=f"{found.loss:.4f}",
                perplexity=f"{found.perplexity:,.2f}",
                bits_per_byte=f"{found.bits_per_byte:.4f}",
                tokens=f"{found.num_tokens:,}",
            )
        if questions:
            score = score_hellaswag(model, tokenizer, questions, batch_size=self.batch_size, track=_track("HellaSwag"))
            _report(
                hellaswag_accuracy=f"{score.accuracy:.4f}",
                hellaswag_accuracy_norm=f"{score.accuracy_norm:.4f}",
                hellaswag_questions=f"{score.num_questions:,}",
            )


def _track(what: str) -> "Track":
    """A progress bar, on a terminal only."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)

    def shown(numbers: Sequence[int]) -> Iterable[int]:
        return track(numbers, what, console=console, transient=True) if console.is_terminal else numbers

    return shown


def _report(**figures: str) -> None:
    for name, figure in figures.items():
        print(f"{name.replace('_', ' '):24}{figure}")
