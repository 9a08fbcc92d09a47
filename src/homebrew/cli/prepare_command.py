"""`homebrew prepare`: tokenize text files."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg


@dataclass
class Prepare:
    """Tokenize text files of any size into token files, which `homebrew train` reads without loading them.

    A token file is a NumPy array, book.npy, beside its metadata, book.json: the tokenizer, the number of tokens and the
    SHA-256. If the command is interrupted, the same command continues from the folder book.partial.
    """

    texts: Positional[Annotated[tuple[Path, ...], arg(metavar="TEXT [TEXT ...]", help_behavior_hint="(required)")]]
    """UTF-8 text files, JSON Lines (.jsonl, .ndjson, .json), .parquet files, folders or patterns. All but .parquet may
    be compressed (.gz, .zst). The tokenizer's end-of-text token, if any, separates files, lines of JSON Lines and rows
    of .parquet."""
    output: Path
    """Token file to write, such as book.npy. An existing token file is replaced."""
    tokenizer: Literal["gpt2", "bytes", "char"] | Path = "gpt2"
    """GPT-2's 50,257 tokens, the 256 bytes, the characters that occur in the texts, or the path of a tokenizer that
    `homebrew tokenizer train` has written."""
    text_field: str = "text"
    """Key or column of the text in JSON Lines and .parquet files."""
    allow_special: bool = False
    """Let <|endoftext|> in a text separate documents. Otherwise it is text like any other."""
    val_fraction: float = 0.0
    """Fraction of the documents to write to book-val.npy, the rest to book-train.npy. Which ones depends on a hash of
    their text."""
    shard_tokens: Annotated[int | None, arg(help_behavior_hint="(default: one file)")] = None
    """Number of tokens of a file: book-00000.npy, book-00001.npy, and so on."""
    workers: Annotated[int | None, arg(help_behavior_hint="(default: number of CPU cores)")] = None
    """Number of processes. The result does not depend on it."""

    def run(self) -> None:
        """Write the token files and print how to train on them."""
        from homebrew.data.preparation.prepare import output_paths, prepare

        metadata = prepare(
            self.texts,
            self.output,
            tokenizer=self.tokenizer,
            text_field=self.text_field,
            allow_special=self.allow_special,
            val_fraction=self.val_fraction,
            shard_tokens=self.shard_tokens,
            workers=self.workers,
            progress=True,
        )
        files = [
            str(path.with_stem(f"{path.stem}-*") if self.shard_tokens else path)
            for path in output_paths(self.output, self.val_fraction).values()
        ]
        print(f"{files[0]}: {metadata.num_tokens:,} tokens from {metadata.num_text_bytes:,} bytes of text.")
        options = ["--output-dir", f"runs/{self.output.stem}", "--max-steps", "1000"]
        for path in files[1:]:
            options += ["--eval-data", path]
        print(f"To train on it: {shlex.join(['homebrew', 'train', files[0], *options])}")
