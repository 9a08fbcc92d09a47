"""Validation of datasets before the first training step, and of each sample."""

import math
from collections.abc import Callable, Mapping, Sized
from numbers import Integral
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from homebrew.constants import IGNORE_INDEX
from homebrew.data.sample_rng import restore_generators
from homebrew.data.samples import Sample, as_sample
from homebrew.data.token_ids import TOKENIZE
from homebrew.errors import DataError, HomebrewError

NUM_CHECKED = 8
"""Number of samples of a dataset that are read before the first step, evenly spaced from the first to the last."""

_ATTRIBUTES: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    ("vocab_size", "an integer of at least 1", lambda value: isinstance(value, Integral) and int(value) > 0),
    (
        "bytes_per_token",
        "a number above 0, or None",
        lambda value: value is None or (isinstance(value, int | float) and 0 < value < math.inf),
    ),
)
"""Attributes that a dataset may have, the rule their values must follow, and a predicate for the rule."""


def check_dataset(dataset: Dataset[Any], name: str, *, block_size: int | None, vocab_size: int | None) -> list[int]:
    """Check that a dataset can be used with a model of the given sizes. Error messages call the dataset `name`.

    A size that is None is not checked.

    Returns:
        The lengths in tokens of the samples that were read, each once, in ascending order.

    Raises:
        DataError: If the dataset is not map-style or is empty, or if one of `NUM_CHECKED` samples is not valid (see
            `as_sample`), is longer than `block_size`, or has an id outside the vocabulary.
    """
    num_samples = _num_samples(dataset, name)
    for attribute, rule, holds in _ATTRIBUTES:
        if hasattr(dataset, attribute) and not holds(value := getattr(dataset, attribute)):
            raise DataError(
                f"{name}.{attribute} is {value!r:.100}, but must be {rule}. Change or remove the attribute."
            )
    dataset_vocab_size = getattr(dataset, "vocab_size", 0)
    if vocab_size is not None and dataset_vocab_size > vocab_size:
        raise DataError(
            f"{name} has token ids up to {dataset_vocab_size - 1}, but the model's vocab_size is {vocab_size}. Build "
            f"the model with vocab_size={dataset_vocab_size}."
        )
    lengths = set()
    for index in sorted({i * (num_samples - 1) // (NUM_CHECKED - 1) for i in range(NUM_CHECKED)}):
        sample_name = f"{name}[{index}]"
        sample = _read_sample(dataset, index, sample_name, num_samples)
        length = len(sample[0])
        check_length(length, sample_name, block_size)
        check_ids(*sample, sample_name, vocab_size)
        lengths.add(length)
    return sorted(lengths)


def check_map_style(dataset: object, name: str) -> None:
    """Check that samples can be read by index.

    Raises:
        DataError: The dataset is a text or a path, a stream, or a dictionary of datasets.
    """
    if isinstance(dataset, str | bytes | Path):
        raise DataError(f"{name} is the text or path {str(dataset)!r:.100}, but must be a dataset. {TOKENIZE}")
    if isinstance(dataset, Mapping):
        keys = ", ".join(map(repr, dataset))
        raise DataError(
            f"{name} is a dictionary with the keys {keys:.200}, but must be one dataset. Choose one of its "
            f"values, such as dataset['train']."
        )
    if not isinstance(dataset, Sized) or isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        raise DataError(
            f"{name} is of type {type(dataset).__name__}, but must be a map-style dataset (__len__, __getitem__): "
            f"each step reads its samples by index, so that a run resumes exactly. Read a stream into memory with "
            f"list(dataset), or write its text or tokens to files with homebrew prepare or write_tokens, and open them "
            f"with TokenDataset.from_shards."
        )


def _num_samples(dataset: Dataset[Any], name: str) -> int:
    check_map_style(dataset, name)
    try:
        num_samples = len(dataset)  # type: ignore[arg-type]
    except Exception as error:
        raise DataError(
            f"{name} has no length: {error!r}. Its __len__ must return the number of samples, a non-negative integer."
        ) from error
    if num_samples == 0:
        raise DataError(f"{name} is empty. Give a dataset with at least one sample.")
    return num_samples


def _read_sample(dataset: Dataset[Any], index: int, name: str, num_samples: int) -> Sample:
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
    return as_sample(sample, name)


def check_length(num_tokens: int, name: str, block_size: int | None) -> None:
    """Check that a sample fits into the model's block size, if known."""
    if block_size is not None and num_tokens > block_size:
        raise DataError(
            f"{name} has {num_tokens} tokens, but the model's block_size is {block_size}. Use shorter sequences, or a "
            f"model with block_size={num_tokens}."
        )


def check_ids(input_ids: Tensor, targets: Tensor, name: str, vocab_size: int | None) -> None:
    """Check that all token ids are in the model's vocabulary, if known. A target may also be `IGNORE_INDEX`."""
    if vocab_size is None:
        return
    for kind, ids in (("input_ids", input_ids), ("targets", targets[targets != IGNORE_INDEX])):
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
            raise DataError(
                f"{name} has {kind} from {int(ids.min())} to {int(ids.max())}, but the model's vocabulary is 0 to "
                f"{vocab_size - 1}. Use the tokenizer of the model, and {IGNORE_INDEX} for targets to ignore."
            )
