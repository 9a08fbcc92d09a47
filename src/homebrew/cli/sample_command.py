"""`homebrew sample`."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional, UseAppendAction, arg

from homebrew.cli.open_model import Dtype, open_model

Write = Callable[[str, tuple[str, ...], int], Iterator[str]]
"""What follows a text, in pieces: the text, strings to stop before, which turn it is."""


@dataclass
class Sample:
    """Let a model write: on from --prompt, or in turns with you.

    Without --prompt each line you type is added to the text so far and the model goes on from there, up to an empty
    line or --stop; Ctrl-D ends it. Text comes as it is written.
    """

    checkpoint: Positional[Annotated[str, arg(metavar="CHECKPOINT")]]
    """A run's folder (its newest checkpoint), a checkpoint, a folder or hub repository in transformers' format, or an
    adapter's folder in PEFT's."""
    base: str | None = None
    """For an adapter, where its base is now, if not where it was trained on it."""
    prompt: str | None = None
    """Text to go on from; it is written too."""
    max_new_tokens: int = 200
    """Tokens to write, each turn, at most."""
    temperature: float = 1.0
    """Divides the logits: below 1 is more careful, 0 always takes the likeliest token."""
    top_k: int = 50
    """Draw from the k likeliest tokens only; 0 from all."""
    top_p: float | None = None
    """Draw from the likeliest tokens that together reach this probability only."""
    min_p: float | None = None
    """Draw from tokens at least this fraction as probable as the likeliest only."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens that already occur less likely."""
    stop: UseAppendAction[tuple[str, ...]] = ()
    """End before this text; can be given several times."""
    seed: int | None = None
    """Of the choice; without one each run differs."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; auto is the first accelerator there is."""
    dtype: Dtype = "auto"
    """Of the weights; auto is bfloat16 on a GPU that has it, else float32."""
    tokenizer: Literal["gpt2", "bytes"] | None = None
    """For a model that does not say which one it was trained with."""

    def run(self) -> None:
        """Do it."""
        from homebrew.data.tokenizer import default_prompt, newline_for
        from homebrew.generation.sampling import Sampling

        sampling = Sampling(  # first of all: what is wrong here should not be said after a model is loaded
            temperature=self.temperature,
            top_k=self.top_k or None,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
        )
        model, tokenizer = open_model(
            self.checkpoint, self.device, self.dtype, base=self.base, tokenizer=self.tokenizer
        )

        def write(text: str, stop: tuple[str, ...], turn: int) -> Iterator[str]:
            from homebrew.generation.streaming import generate_text

            return generate_text(
                model,
                tokenizer,
                text or default_prompt(tokenizer),
                self.max_new_tokens,
                sampling,
                stop=stop,
                eos_token_id=tokenizer.end_of_text_id,
                seed=None if self.seed is None else self.seed + turn,
            )

        if self.prompt is None:
            self._converse(write, newline_for(tokenizer))
            return
        pieces = write(self.prompt, self.stop, 0)
        first = next(pieces, "")  # or an error, before anything is shown
        _show(self.prompt + first)
        for piece in pieces:
            _show(piece)
        _show("\n")

    def _converse(self, write: Write, line_end: str) -> None:
        ask = "> " if sys.stdin.isatty() else ""
        text, turn = "", 0
        while True:
            try:
                text += input(ask) + line_end
            except EOFError:
                return
            for piece in write(text, self.stop or ("\n\n",), turn):
                _show(piece)
                text += piece
            _show("\n")
            text += 2 * line_end
            turn += 1


def _show(text: str) -> None:
    print(text, end="", flush=True)
