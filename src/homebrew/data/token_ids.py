"""Validation of token ids that users pass in."""

import operator
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeGuard

import numpy as np
from numpy.typing import NDArray

from homebrew.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

TokenIds = NDArray[np.integer]

TOKENIZE = "Tokenize a text with TokenDataset.from_text(text, …), or a file with TokenDataset.from_file(path, …)."
"""Advice for an error about a text that was given in place of token ids."""

MAX_VOCAB_SIZE = 2**31
"""Token ids are int32 on the device."""


def is_tensor(value: object) -> "TypeGuard[Tensor]":
    """Return whether a value is a tensor, without importing PyTorch: `homebrew prepare` does not need it."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def as_token_ids(ids: "Tensor | TokenIds | Sequence[int]") -> TokenIds:
    """Convert token ids to a NumPy array (num_tokens,) without changing their integer dtype."""
    rule = "must be a one-dimensional sequence of integers. Convert them first."
    if isinstance(ids, Mapping):
        raise DataError(f"Token ids are a dictionary with the keys {sorted(map(str, ids))}. Pass its input_ids.")
    try:
        array = ids.cpu().numpy() if is_tensor(ids) else np.asarray(ids)
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: a tensor that requires a gradient
        raise DataError(f"Token ids {rule} ({error})") from error
    if array.dtype.kind in "US":
        raise DataError(f"Token ids are text. {TOKENIZE}")
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise DataError(f"Token ids are {array.dtype} of shape {array.shape}, but {rule}")
    return array


def check_token_ids(ids: TokenIds, vocab_size: int) -> None:
    """Check that token ids are in the vocabulary. There must be at least one."""
    smallest, largest = int(ids.min()), int(ids.max())
    if smallest < 0 or largest >= min(vocab_size, MAX_VOCAB_SIZE):
        raise DataError(
            f"Token id {smallest if smallest < 0 else largest} is outside the vocabulary of {vocab_size} (0 to "
            f"{vocab_size - 1}). Use the tokenizer that made the ids, or give its vocab_size."
        )


def validated_ids(ids: Iterable[int], vocab_size: int) -> list[int]:
    """Return the ids as Python integers, after checking that they are in the vocabulary."""
    try:
        numbers = [operator.index(i) for i in ids]
    except TypeError as error:
        raise DataError(f"The token ids are not integers: {error}. Convert them first.") from None
    for i in numbers:
        if not 0 <= i < vocab_size:
            raise DataError(
                f"Token id {i} is outside the vocabulary of {vocab_size} (0 to {vocab_size - 1}). Use the tokenizer "
                f"that made the ids."
            )
    return numbers
