"""Open the datasets of `homebrew train`: a text file or token files, and the data to evaluate on."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from homebrew.errors import DataError

if TYPE_CHECKING:
    from homebrew.data.dataset import TokenDataset
    from homebrew.data.tokenizer import Tokenizer


def open_dataset(paths: Sequence[Path], block_size: int, tokenizer: "Tokenizer | str") -> "TokenDataset":
    """Open one text file, with the given tokenizer, or any number of token files."""
    from homebrew.data.dataset import TokenDataset

    if not paths:
        raise DataError("No data is given. Pass a text file, or token files written by `homebrew prepare`.")
    if are_token_files(paths):
        return TokenDataset.from_shards(paths, block_size)
    if len(paths) > 1:
        raise DataError(f"{len(paths)} text files are given. Combine them into one token file with `homebrew prepare`.")
    return TokenDataset.from_file(paths[0], block_size, tokenizer=tokenizer)


def open_eval_dataset(path: Path, train_dataset: "TokenDataset") -> "TokenDataset":
    """Open a file to evaluate on, with the block size and the tokenizer of the training data."""
    dataset = open_dataset([path], train_dataset.block_size, train_dataset.tokenizer or "gpt2")
    if not is_same_tokenizer(dataset.tokenizer, train_dataset.tokenizer):
        raise DataError(
            f"{path} and the training data have different tokenizers. Prepare both with the same --tokenizer."
        )
    return dataset


def are_token_files(paths: Sequence[Path]) -> bool:
    """Return whether any of the paths is a token file; then all must be."""
    from homebrew.data.token_file import is_token_file

    return any(map(is_token_file, paths))


def is_same_tokenizer(a: "Tokenizer | None", b: "Tokenizer | None") -> bool:
    """Return whether two tokenizers map text to the same ids; None means unknown."""
    return (a and a.to_json()) == (b and b.to_json())
