"""`homebrew prepare`: tokenize text files."""

import shlex
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

    texts: Positional[Annotated[tuple[Path, ...], arg(metavar="TEXT [TEXT ...]", help_behavior_hint="(required)")]]
    """UTF-8 text files, or folders of .txt files. The tokenizer's end-of-text token, if any, separates texts."""
    output: Path
    """Token file to write, such as book.npy. An existing token file is replaced."""
    tokenizer: Literal["gpt2", "bytes", "char"] | Path = "gpt2"
    """GPT-2's 50,257 tokens, the 256 bytes, the characters that occur in the texts, or the path of a tokenizer that
    `homebrew tokenizer train` has written."""

    def run(self) -> None:
        """Write the token file and print how to train on it."""
        from homebrew.data.prepare import prepare

        metadata = prepare(self.texts, self.output, tokenizer=self.tokenizer)
        print(f"{self.output}: {metadata.num_tokens:,} tokens from {metadata.num_text_bytes:,} bytes of text.")
        command = [
            "homebrew",
            "train",
            str(self.output),
            "--output-dir",
            f"runs/{self.output.stem}",
            "--max-steps",
            "1000",
        ]
        print(f"To train on it: {shlex.join(command)}")
