"""Open the datasets of `homebrew train`: text files or token files, and the data to evaluate on."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from homebrew.errors import DataError

if TYPE_CHECKING:
    from homebrew.data.dataset import TokenDataset
    from homebrew.data.tokenizer import Tokenizer


def data_files(paths: Sequence[Path]) -> list[Path]:
    """Replace each folder by its token files or, if it has none, by its text files, and each pattern by its matches."""
    from homebrew.data.text_paths import TEXT_SUFFIXES, expand_paths

    return expand_paths(paths, ".npy", TEXT_SUFFIXES)


def open_dataset(files: Sequence[Path], block_size: int, tokenizer: "Tokenizer | str | Path | None") -> "TokenDataset":
    """Open text files with the given tokenizer, or token files, which may name their own tokenizer."""
    from homebrew.data.dataset import TokenDataset

    if not files:
        raise DataError("No data is given. Pass text files or token files.")
    return TokenDataset.from_file(files, block_size, tokenizer=tokenizer, check=True)


def open_eval_dataset(files: Sequence[Path], train_dataset: "TokenDataset") -> "TokenDataset":
    """Open files to evaluate on, with the block size and the tokenizer of the training data."""
    dataset = open_dataset(files, train_dataset.block_size, train_dataset.tokenizer)
    if not is_same_tokenizer(dataset.tokenizer, train_dataset.tokenizer):
        raise DataError(
            f"{files[0]} and the training data have different tokenizers. Prepare both with the same --tokenizer."
        )
    return dataset


def are_token_files(files: Sequence[Path]) -> bool:
    """Return whether any of the files is a token file. If one is, all must be."""
    from homebrew.data.token_formats import is_token_file

    return any(map(is_token_file, files))


def token_files_tokenizer(files: Sequence[Path]) -> str | None:
    """Return the name of the tokenizer that made the token files, or None for text files or if it is unknown."""
    from homebrew.data.token_formats import named_tokenizer

    description = named_tokenizer(files[0]) if are_token_files(files) else None
    return description.get("name") if description else None


def is_same_tokenizer(a: "Tokenizer | None", b: "Tokenizer | None") -> bool:
    """Return whether two tokenizers map text to the same ids; None means unknown."""
    return (a and a.to_json()) == (b and b.to_json())
