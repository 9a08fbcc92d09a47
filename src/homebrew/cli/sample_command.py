"""`homebrew sample`: generate text from a prompt or in interactive mode."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from tyro.conf import UseAppendAction, arg

from homebrew.cli.open_model import SavedModel
from homebrew.errors import ConfigError, DataError

if TYPE_CHECKING:
    from homebrew.data.tokenizer import Tokenizer
    from homebrew.generation.sampling import Sampling
    from homebrew.model.gpt import GPT


@dataclass(kw_only=True)
class Sample(SavedModel):
    """Generate text from a prompt, or in interactive mode without --prompt.

    In interactive mode:
      - Each line you type is appended to the text so far.
      - The model continues it, and stops when it writes an empty line or a --stop string.
      - Enter without a text continues further.
      - Ctrl-D exits.
    """

    prompt: Annotated[str | None, arg(help_behavior_hint="(default: interactive mode)")] = None
    """Text to continue. It is printed before the generated text."""
    max_new_tokens: int = 200
    """Maximum number of tokens to generate, per turn in interactive mode."""
    temperature: float = 1.0
    """Divides the logits. Values below 1 make likely tokens more likely; 0 always selects the most likely token."""
    top_k: int = 50
    """Sample only from the k most likely tokens. 0 disables the limit."""
    top_p: Annotated[float | None, arg(help_behavior_hint="(default: off)")] = None
    """Sample only from the most likely tokens whose probabilities add up to this value."""
    min_p: Annotated[float | None, arg(help_behavior_hint="(default: off)")] = None
    """Sample only from tokens whose probability is at least this fraction of the most likely token's."""
    repetition_penalty: float = 1.0
    """Values above 1 make tokens that already occur in the text less likely."""
    stop: UseAppendAction[tuple[str, ...]] = ()
    """Stop before this string."""
    seed: Annotated[int | None, arg(help_behavior_hint="(default: random)")] = None
    """Random seed for sampling."""

    def run(self) -> None:
        """Run the command."""
        from homebrew.generation.sampling import Sampling

        if self.top_k < 0:
            raise ConfigError(f"--top-k {self.top_k} is not valid. Use an integer of at least 0; 0 keeps all tokens.")
        sampling = Sampling(  # checks the options: before loading the model, which takes longer
            temperature=self.temperature,
            top_k=self.top_k or None,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
        )
        model, tokenizer = self.open_model()
        if self.prompt is None:
            self._run_interactive(model, tokenizer, sampling)
            return
        chunks = self._generate(model, tokenizer, self.prompt, sampling, stop=self.stop)
        first_chunk = next(chunks, "")  # raises errors before anything is printed
        _print_now(self.prompt + first_chunk)
        for chunk in chunks:
            _print_now(chunk)
        _print_now("\n")

    def _run_interactive(self, model: "GPT", tokenizer: "Tokenizer", sampling: "Sampling") -> None:
        from homebrew.data.tokenizer import newline_for

        newline = newline_for(tokenizer)
        input_prompt = ""
        if sys.stdin.isatty():
            input_prompt = "> "
            print("Type the beginning of a text, and the model continues it. Press Enter for more, Ctrl-D to exit.")
        text, turn = "", 0
        while True:
            try:
                line = input(input_prompt) + newline
                tokenizer.encode(line)
            except EOFError:
                return
            except DataError as error:  # a character that is not in the tokenizer's alphabet
                if not input_prompt:
                    raise
                print(f"homebrew: {error}", file=sys.stderr)
                continue
            text += line
            for chunk in self._generate(model, tokenizer, text, sampling, stop=self.stop or ("\n\n",), turn=turn):
                _print_now(chunk)
                text += chunk
            _print_now("\n")
            text += 2 * newline
            turn += 1

    def _generate(
        self,
        model: "GPT",
        tokenizer: "Tokenizer",
        text: str,
        sampling: "Sampling",
        *,
        stop: tuple[str, ...],
        turn: int = 0,
    ) -> Iterator[str]:
        """Generate the continuation of a text, in chunks. Each turn has its own seed."""
        from homebrew.data.tokenizer import default_prompt
        from homebrew.generation.streaming import generate_text

        return generate_text(
            model,
            tokenizer,
            text or default_prompt(tokenizer),
            self.max_new_tokens,
            sampling=sampling,
            stop=stop,
            eos_token_id=model.config.end_of_text_id(tokenizer),
            seed=None if self.seed is None else self.seed + turn,
        )


def _print_now(text: str) -> None:
    print(text, end="", flush=True)
