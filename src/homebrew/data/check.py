"""Whether a dataset can train a model, asked before the first step."""

from collections.abc import Sized
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

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
        DataError: it is empty, a sample is not a pair of equally long rows of ids, or is too long, or its token
            ids go beyond the vocabulary.
    """
    if len(cast("Sized", dataset)) == 0:
        raise DataError(f"{name} is empty: training needs at least one sample.")
    sample = dataset[0]
    if not (
        isinstance(sample, tuple | list)
        and len(sample) == 2
        and all(isinstance(ids, Tensor) and ids.dim() == 1 and ids.dtype == torch.int64 for ids in sample)
        and len(sample[0]) == len(sample[1])
    ):
        raise DataError(f"{name}[0] must be (input_ids, targets), two int64 tensors of equal length; got {sample!r}.")
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
    return sequence_length
