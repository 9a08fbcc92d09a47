"""`homebrew prepare`: tokenize text files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg


@dataclass
class Prepare:
    """Tokenize text files of any size into one token file, which `homebrew train` reads without loading it.

    A token file is a NumPy array, book.npy, beside its metadata, book.json: the tokenizer, the number of tokens and the
    SHA-256.
    """

    texts: Positional[Annotated[tuple[Path, ...], arg(metavar="TEXT [TEXT ...]")]]
    """UTF-8 text files. GPT-2's tokenizer separates them by an end-of-text token."""
    output: Path
    """Token file to write, such as book.npy. An existing token file is replaced."""
    tokenizer: Literal["gpt2", "bytes", "char"] = "gpt2"
    """GPT-2's 50,257 tokens, the 256 bytes, or the characters that occur in the texts."""

    def run(self) -> None:
        """Write the token file and print how to train on it."""
        from homebrew.data.prepare import prepare

        metadata = prepare(self.texts, self.output, tokenizer=self.tokenizer)
        print(f"{self.output}: {metadata.num_tokens:,} tokens from {metadata.num_text_bytes:,} bytes of text.")
        print(f"To train on it: homebrew train {self.output} --output-dir runs/first --max-steps 100")
        print("On a CPU, GPT-2 small takes hours: add --preset baby --learning-rate 3e-3 --global-batch-tokens 2048")
