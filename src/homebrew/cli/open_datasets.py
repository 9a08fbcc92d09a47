"""Open the datasets of `homebrew train`: a text file or token files, and the data to evaluate on."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from homebrew.errors import DataError

if TYPE_CHECKING:
    from homebrew.data.dataset import TokenDataset
    from homebrew.data.tokenizer import Tokenizer


def open_dataset(paths: Sequence[Path], block_size: int, tokenizer: "Tokenizer | str") -> "TokenDataset":
    """Open a text file or token files.

    Args:
        paths: One text file, or any number of token files.
        block_size: Tokens per sequence.
        tokenizer: Tokenizer for a text file.

    Raises:
        DataError: No path is given, several are text files, or a file cannot be read.
    """
    from homebrew.data.dataset import TokenDataset

    if not paths:
        raise DataError("No data is given. Pass a text file, or token files written by `homebrew prepare`.")
    if are_token_files(paths):
        return TokenDataset.from_shards(paths, block_size)
    if len(paths) > 1:
        raise DataError(f"{len(paths)} text files are given. Combine them into one token file with `homebrew prepare`.")
    return TokenDataset.from_file(paths[0], block_size, tokenizer=tokenizer)


def open_eval_dataset(path: Path, train_dataset: "TokenDataset") -> "TokenDataset":
    """Open a file to evaluate on, with the block size and the tokenizer of the training data.

    Args:
        path: Text or token file.
        train_dataset: Training dataset.

    Raises:
        DataError: The file cannot be read, or has another tokenizer.
    """
    dataset = open_dataset([path], train_dataset.block_size, train_dataset.tokenizer or "gpt2")
    if not is_same_tokenizer(dataset.tokenizer, train_dataset.tokenizer):
        raise DataError(
            f"{path} and the training data have different tokenizers. Prepare both with the same --tokenizer."
        )
    return dataset


def split_dataset(dataset: "TokenDataset", eval_fraction: float, *, seed: int) -> tuple["TokenDataset", "TokenDataset"]:
    """Split a dataset into training and evaluation data.

    Args:
        dataset: Dataset to split.
        eval_fraction: Fraction of the sequences to evaluate on.
        seed: Random seed of the choice.

    Raises:
        DataError: One of the parts would be empty.
    """
    try:
        return dataset.split(1 - eval_fraction, seed=seed)
    except DataError as error:
        raise DataError(
            f"--eval-fraction {eval_fraction:g} of {len(dataset)} sequences leaves no training or no evaluation data. "
            f"Change --eval-fraction (0 disables evaluation), or decrease --block-size."
        ) from error


def are_token_files(paths: Sequence[Path]) -> bool:
    """Return whether any of the paths is a token file; then all must be."""
    from homebrew.data.token_file import is_token_file

    return any(map(is_token_file, paths))


def is_same_tokenizer(a: "Tokenizer | None", b: "Tokenizer | None") -> bool:
    """Return whether two tokenizers map text to the same ids; None means unknown."""
    return (a and a.to_json()) == (b and b.to_json())
