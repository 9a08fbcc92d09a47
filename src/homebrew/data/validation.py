"""Whether a dataset can train a model, asked before the first step."""

from collections.abc import Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from homebrew.constants import IGNORE_INDEX
from homebrew.errors import DataError


def check_dataset(dataset: Dataset[Any], name: str, *, block_size: int, vocab_size: int) -> int:
    """Refuse a dataset the model cannot read.

    Args:
        dataset: map-style.
        name: how messages call it.
        block_size: the longest sequence the model takes, in tokens.
        vocab_size: ids the model knows.

    Returns:
        Tokens in a sample's input.

    Raises:
        DataError: it is not map-style, it is empty, or its first sample is not a pair of equally long rows of ids,
            is too long, or has an id outside the vocabulary.
    """
    if not isinstance(dataset, Sized) or isinstance(dataset, IterableDataset):
        raise DataError(
            f"{name} is a {type(dataset).__name__}: it must be map-style, with __len__ and __getitem__, so that each "
            f"step can ask for its own samples."
        )
    if len(dataset) == 0:
        raise DataError(f"{name} is empty: training needs at least one sample.")
    sample = dataset[0]
    check_sample(sample, f"{name}[0]")
    sequence_length = len(sample[0])
    if sequence_length > block_size:
        raise DataError(
            f"{name} has sequences of {sequence_length} tokens, but the model's block_size is {block_size}: "
            f"make shorter windows, or a model with block_size={sequence_length}."
        )
    needed = getattr(dataset, "vocab_size", 0)
    if needed > vocab_size:
        raise DataError(
            f"{name} has token ids up to {needed - 1}, but the model's vocab_size is {vocab_size}: build the "
            f"model with vocab_size={needed}."
        )
    check_ids(sample[0], sample[1], f"{name}[0]", vocab_size)
    return sequence_length


def check_sample(sample: object, name: str) -> None:
    """Refuse what is not a pair of equally long rows of ids.

    Raises:
        DataError: it is something else.
    """
    if not (
        isinstance(sample, tuple | list)
        and len(sample) == 2
        and all(isinstance(ids, Tensor) and ids.dim() == 1 and ids.dtype == torch.int64 for ids in sample)
        and 0 < len(sample[0]) == len(sample[1])
    ):
        raise DataError(
            f"{name} must be (input_ids, targets), two int64 tensors of one equal length; got {sample!r:.300}."
        )


def check_ids(input_ids: Tensor, targets: Tensor, name: str, vocab_size: int) -> None:
    """Refuse ids the model does not know; a target may be `IGNORE_INDEX`.

    Raises:
        DataError: an id is outside the vocabulary.
    """
    for kind, ids in (("input_ids", input_ids), ("targets", targets[targets != IGNORE_INDEX])):
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
            raise DataError(
                f"{name} has {kind} from {int(ids.min())} to {int(ids.max())}, but the model's vocabulary is 0 to "
                f"{vocab_size - 1} ({IGNORE_INDEX} marks targets that are not scored)."
            )
