"""`homebrew prepare`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg


@dataclass
class Prepare:
    """Turn text files into one token file, which `homebrew train` reads by position, however large it is.

    The file also says which tokenizer made it and what its tokens' SHA-256 is.
    """

    texts: Positional[Annotated[tuple[Path, ...], arg(metavar="TEXT [TEXT ...]")]]
    """UTF-8 text files. With GPT-2's tokenizer an end-of-text token stands between two."""
    output: Path
    """The token file to write; one that is there is replaced, a file of another kind is not."""
    tokenizer: Literal["gpt2", "bytes", "char"] = "gpt2"
    """GPT-2's 50,257 tokens, the 256 bytes, or the characters that occur in the texts."""

    def run(self) -> None:
        """Do it."""
        from homebrew.data.prepare import prepare

        header = prepare(self.texts, self.output, tokenizer=self.tokenizer)
        print(f"{self.output}: {header.num_tokens:,} tokens of {header.num_text_bytes:,} bytes of text.")
        print(f"To train on it: homebrew train {self.output} --output-dir runs/first --max-steps 500")
        print("On a CPU, where GPT-2 small takes hours: add --preset baby --learning-rate 3e-3")
