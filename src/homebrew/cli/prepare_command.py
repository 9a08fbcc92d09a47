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
        """Write the token files, and print their sizes and how to train on them."""
        from homebrew.data.preparation.prepare import output_paths, prepare

        sizes = prepare(
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
        paths = output_paths(self.output, self.val_fraction)
        files = {
            split: str(path.with_stem(f"{path.stem}-*") if self.shard_tokens else path) for split, path in paths.items()
        }
        num_tokens = sum(size.num_tokens for size in sizes.values())
        for split, size in sizes.items():
            share = f" ({size.num_tokens / num_tokens:.2%})" if self.val_fraction else ""
            documents = "document" if size.num_documents == 1 else "documents"
            print(
                f"{files[split]}: {size.num_tokens:,} tokens{share} from {size.num_documents:,} {documents}, "
                f"{size.num_text_bytes:,} bytes of text."
            )
        if self.val_fraction and not is_near(sizes["val"].num_tokens / num_tokens, self.val_fraction):
            print(
                f"The share is far from --val-fraction {self.val_fraction}, because a hash splits whole documents. "
                f"Give more or shorter documents, or prepare the validation texts separately."
            )
        options = ["--output-dir", f"runs/{self.output.stem}", "--max-steps", "1000"]
        if "val" in files:
            options += ["--eval-data", files["val"]]
        print(f"To train on it: {shlex.join(['homebrew', 'train', files['train'], *options])}")


def is_near(share: float, expected: float) -> bool:
    """Return whether neither split is more than twice, or less than half, as large as expected."""
    return max(share / expected, expected / share, (1 - share) / (1 - expected), (1 - expected) / (1 - share)) <= 2
