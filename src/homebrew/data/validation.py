"""Validation of datasets before the first training step, and of each sample."""

from collections.abc import Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from homebrew.constants import IGNORE_INDEX
from homebrew.errors import DataError


def check_dataset(dataset: Dataset[Any], name: str, *, block_size: int, vocab_size: int) -> int:
    """Check that a dataset can be used with a model of the given sizes. Error messages call the dataset `name`.

    Returns:
        Sequence length of the first sample, in tokens.

    Raises:
        DataError: If the dataset is not map-style or is empty, or if its first sample is not a pair of int64 tensors
            of equal length, is longer than `block_size`, or has an id outside the vocabulary.
    """
    if not isinstance(dataset, Sized) or isinstance(dataset, IterableDataset):
        raise DataError(
            f"{name} is a {type(dataset).__name__}, but must be a map-style dataset: each step reads its samples by "
            f"index. Implement __len__ and __getitem__."
        )
    if len(dataset) == 0:
        raise DataError(f"{name} is empty. Give a dataset with at least one sample.")
    sample = dataset[0]
    check_sample(sample, f"{name}[0]")
    sequence_length = len(sample[0])
    if sequence_length > block_size:
        raise DataError(
            f"{name} has sequences of {sequence_length} tokens, but the model's block_size is {block_size}. "
            f"Use shorter sequences, or a model with block_size={sequence_length}."
        )
    dataset_vocab_size = getattr(dataset, "vocab_size", 0)
    if dataset_vocab_size > vocab_size:
        raise DataError(
            f"{name} has token ids up to {dataset_vocab_size - 1}, but the model's vocab_size is {vocab_size}. Build "
            f"the model with vocab_size={dataset_vocab_size}."
        )
    check_ids(sample[0], sample[1], f"{name}[0]", vocab_size)
    return sequence_length


def check_sample(sample: object, name: str) -> None:
    """Check that a sample is a pair of one-dimensional int64 tensors of equal length."""
    if not (
        isinstance(sample, tuple | list)
        and len(sample) == 2
        and all(isinstance(ids, Tensor) and ids.dim() == 1 and ids.dtype == torch.int64 for ids in sample)
        and 0 < len(sample[0]) == len(sample[1])
    ):
        raise DataError(
            f"{name} is {sample!r:.300}, but must be (input_ids, targets), two one-dimensional int64 tensors of equal "
            f"length. Change the dataset's __getitem__."
        )


def check_ids(input_ids: Tensor, targets: Tensor, name: str, vocab_size: int) -> None:
    """Check that all token ids are in the model's vocabulary. A target may also be `IGNORE_INDEX`."""
    for kind, ids in (("input_ids", input_ids), ("targets", targets[targets != IGNORE_INDEX])):
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
            raise DataError(
                f"{name} has {kind} from {int(ids.min())} to {int(ids.max())}, but the model's vocabulary is 0 to "
                f"{vocab_size - 1}. Use the tokenizer of the model, and {IGNORE_INDEX} for targets to ignore."
            )
