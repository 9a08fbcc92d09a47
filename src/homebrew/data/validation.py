"""Validation of datasets before the first training step, and of each sample."""

import math
from collections.abc import Callable, Sized
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from homebrew.constants import IGNORE_INDEX
from homebrew.data.sample_rng import restore_generators
from homebrew.errors import DataError, HomebrewError

_ATTRIBUTES: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    ("vocab_size", "an integer of at least 1", lambda value: isinstance(value, Integral) and int(value) > 0),
    (
        "bytes_per_token",
        "a number above 0, or None",
        lambda value: value is None or (isinstance(value, int | float) and 0 < value < math.inf),
    ),
)
"""Attributes that a dataset may have, the rule their values must follow, and a predicate for the rule."""


def check_dataset(dataset: Dataset[Any], name: str, *, block_size: int, vocab_size: int) -> int:
    """Check that a dataset can be used with a model of the given sizes. Error messages call the dataset `name`.

    Returns:
        Sequence length of the first sample, in tokens.

    Raises:
        DataError: If the dataset is not map-style or is empty, or if its first or its last sample is not a pair of
            int64 tensors of equal length, is longer than `block_size`, or has an id outside the vocabulary.
    """
    num_samples = _num_samples(dataset, name)
    for attribute, rule, holds in _ATTRIBUTES:
        if hasattr(dataset, attribute) and not holds(value := getattr(dataset, attribute)):
            raise DataError(
                f"{name}.{attribute} is {value!r:.100}, but must be {rule}. Change or remove the attribute."
            )
    dataset_vocab_size = getattr(dataset, "vocab_size", 0)
    if dataset_vocab_size > vocab_size:
        raise DataError(
            f"{name} has token ids up to {dataset_vocab_size - 1}, but the model's vocab_size is {vocab_size}. Build "
            f"the model with vocab_size={dataset_vocab_size}."
        )
    lengths = []
    for index in sorted({0, num_samples - 1}):
        sample_name = f"{name}[{index}]"
        sample = _read_sample(dataset, index, sample_name, num_samples)
        lengths.append(len(sample[0]))
        if lengths[-1] > block_size:
            raise DataError(
                f"{sample_name} has {lengths[-1]} tokens, but the model's block_size is {block_size}. Use shorter "
                f"sequences, or a model with block_size={lengths[-1]}."
            )
        check_ids(*sample, sample_name, vocab_size)
    return lengths[0]


def _num_samples(dataset: Dataset[Any], name: str) -> int:
    if not isinstance(dataset, Sized) or isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        raise DataError(
            f"{name} is a {type(dataset).__name__}, but must be a map-style dataset: each step reads its samples by "
            f"index. Implement __len__ and __getitem__."
        )
    try:
        num_samples = len(dataset)
    except Exception as error:
        raise DataError(
            f"{name} has no length: {error!r}. Its __len__ must return the number of samples, a non-negative integer."
        ) from error
    if num_samples == 0:
        raise DataError(f"{name} is empty. Give a dataset with at least one sample.")
    return num_samples


def _read_sample(dataset: Dataset[Any], index: int, name: str, num_samples: int) -> tuple[Tensor, Tensor]:
    try:
        with restore_generators():  # the dataset may draw from them, and a check must not change the run's dropout
            sample = dataset[index]
    except HomebrewError:
        raise
    except Exception as error:
        raise DataError(
            f"{name} cannot be read: {error!r}. __getitem__ must return a sample for every index below the dataset's "
            f"length, {num_samples}."
        ) from error
    check_sample(sample, name)
    return sample[0], sample[1]


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
