"""What a dataset's samples may be, and how they become the (input_ids, targets) of a batch."""

from collections.abc import Mapping, Sequence
from numbers import Number
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from homebrew.constants import IGNORE_INDEX
from homebrew.data.token_ids import TOKENIZE, as_token_ids
from homebrew.errors import DataError
from homebrew.integers import MAX_INT64

Sample = tuple[Tensor, Tensor]
"""(input_ids, targets), each (T,), int64. The target of a position is the id of the next token, or `IGNORE_INDEX`."""

_SAMPLE_RULE = (
    "(input_ids, targets), a dictionary with 'input_ids', or the token ids of one sample. Change the dataset's "
    "__getitem__, or use TokenDataset.from_tokens if the dataset is one long sequence of ids."
)

_COLUMNS = ("input_ids", "targets", "labels", "loss_mask", "attention_mask")

_UNUSED_COLUMNS = ("token_type_ids", "special_tokens_mask")
"""Columns of Transformers' tokenizers that do not matter to a causal language model."""


def as_sample(sample: Any, name: str, *, labels_are_shifted: bool | None = None) -> Sample:  # noqa: ANN401
    """Convert what a dataset returned for an index. Error messages call the sample `name`.

    Ids may be tensors, NumPy arrays or lists, of any integer dtype. A sample is one of:

    - A pair (input_ids, targets): a tuple, a list or an array with two rows.
    - The token ids: an array or a list. Each token is the target of the one before; the last token has no target.
    - A dictionary with `input_ids`, and at most one of:
        - `targets`: already shifted, `targets[i]` is the token after `input_ids[i]`.
        - `labels`: only with `labels_are_shifted`, because both conventions are common. If False, `labels[i]` belongs
          to `input_ids[i]`, as in Transformers.
      Without either, each token is the target of the one before. `loss_mask` is 0 where `targets`, `labels` or, without
      either, `input_ids` is not a target. `attention_mask` may only mark padding on the right, which has no targets.

    Raises:
        DataError: The sample is none of these.
    """
    if isinstance(sample, Mapping):
        return _from_columns(sample, name, labels_are_shifted)
    if _is_pair(sample):
        input_ids, targets = (_as_ids(ids, name) for ids in sample)
        _check_lengths({"input_ids": input_ids, "targets": targets}, name)
        return input_ids, targets
    input_ids = _as_ids(sample, name)
    _check_lengths({"input_ids": input_ids}, name)
    return input_ids, _shift(input_ids)


def _from_columns(sample: Mapping[str, Any], name: str, labels_are_shifted: bool | None) -> Sample:
    if "input_ids" not in sample:
        raise DataError(
            f"{name} has the keys {sorted(map(str, sample))}, but must have 'input_ids'. Rename the key of the token "
            f"ids, or tokenize texts with TokenDataset.from_dataset."
        )
    if {"targets", "labels"} <= sample.keys():
        raise DataError(f"{name} has both 'targets' and 'labels'. Remove one of them.")
    if "labels" in sample and labels_are_shifted is None:
        raise DataError(
            f"{name} has 'labels', which may be shifted or not. Use homebrew.DictDataset(dataset, "
            f"labels_are_shifted=False) if labels[i] belongs to input_ids[i], as in Transformers, or "
            f"labels_are_shifted=True if it is the token after input_ids[i]."
        )
    key = next((key for key in ("targets", "labels") if key in sample), "input_ids")
    input_ids, targets = (
        _as_ids(sample[column], f"{name}[{column!r}]", "the ids of one sample. Change the dataset.")
        for column in ("input_ids", key)
    )
    masks = {
        key: _as_mask(sample[key], f"{name}[{key!r}]").to(targets.device)
        for key in ("loss_mask", "attention_mask")
        if key in sample
    }
    _check_lengths({"input_ids": input_ids, key: targets} | masks, name)
    _check_other_columns(sample, name, len(input_ids))
    for mask in masks.values():
        targets = targets.masked_fill(~mask, IGNORE_INDEX)
    if "attention_mask" in masks:
        is_real = masks["attention_mask"]
        if not is_real[: int(is_real.sum())].all() or not is_real.any():
            raise DataError(
                f"{name}['attention_mask'] must be ones, then zeros for padding on the right: the model's attention is "
                f"causal and supports no other mask. Set the tokenizer's padding_side to 'right', or do not pad."
            )
        # Padding ids may be outside the vocabulary.
        input_ids = input_ids.masked_fill(~is_real.to(input_ids.device), 0)
    is_shifted = key == "targets" or (key == "labels" and labels_are_shifted)
    return input_ids, targets if is_shifted else _shift(targets)


def _check_other_columns(sample: Mapping[str, Any], name: str, length: int) -> None:
    """Reject other keys with a number per token, such as a misspelled mask. Keys such as a text are ignored."""
    for key in sample.keys() - (*_COLUMNS, *_UNUSED_COLUMNS):
        values = sample[key]
        is_sequence = isinstance(values, Sequence | np.ndarray | Tensor) and getattr(values, "ndim", 1) == 1
        if is_sequence and len(values) == length and isinstance(values[0], Number | np.bool | Tensor):
            raise DataError(
                f"{name}[{key!r}] has a number for each token, but the only such keys may be {', '.join(_COLUMNS)}. "
                f"Rename the key to loss_mask if it marks the targets, or remove it."
            )


def _is_pair(sample: Any) -> bool:  # noqa: ANN401 - whatever a dataset returns
    is_rows = isinstance(sample, tuple | list) or getattr(sample, "ndim", 0) == 2
    return is_rows and len(sample) == 2 and not isinstance(sample[0], int | float) and getattr(sample[0], "ndim", 1) > 0


def _as_ids(values: Any, name: str, rule: str = _SAMPLE_RULE) -> Tensor:  # noqa: ANN401
    """Return ids as an int64 tensor, (T,). Error messages call the ids `name` and state the `rule` for them."""
    is_converted = isinstance(values, Tensor) and values.dtype == torch.int64 and values.layout == torch.strided
    if is_converted and values.dim() == 1 and not values.is_meta:
        return values  # type: ignore[no-any-return]
    if isinstance(values, str | bytes | Path):
        raise DataError(f"{name} is the text or path {str(values)!r:.100}, but must be token ids. {TOKENIZE}")
    try:
        ids = as_token_ids(values)
    except DataError as error:
        raise DataError(f"{name} is {values!r:.300}, but must be {rule} ({error})") from error
    if ids.dtype == np.uint64 and ids.size and int(ids.max()) > MAX_INT64:
        raise DataError(f"{name} has the id {ids.max()}, which exceeds int64. Use the tokenizer of the model.")
    return torch.from_numpy(ids.astype(np.int64))


def _as_mask(values: Any, name: str) -> Tensor:  # noqa: ANN401
    """Return a mask of booleans, integers or floats as a bool tensor, (T,)."""
    try:
        mask = np.asarray(values.tolist() if isinstance(values, Tensor) else values)
        is_valid = mask.ndim == 1 and mask.dtype.kind in "biuf" and bool(((mask == 0) | (mask == 1)).all())
    except (TypeError, ValueError, RuntimeError):
        is_valid = False
    if not is_valid:
        raise DataError(
            f"{name} is {values!r:.300}, but must be a one-dimensional array of 0 and 1. Convert or remove it."
        )
    return torch.from_numpy(mask.astype(bool))


def _check_lengths(columns: Mapping[str, Tensor], name: str) -> None:
    lengths = {key: len(values) for key, values in columns.items()}
    if len(set(lengths.values())) != 1:
        counts = ", ".join(f"{length} {key}" for key, length in lengths.items())
        raise DataError(f"{name} has {counts}, but these must be of equal length. Change the dataset's __getitem__.")
    if 0 in lengths.values():
        raise DataError(f"{name} has no tokens. Remove empty samples, for example with the dataset's filter.")


def _shift(labels: Tensor) -> Tensor:
    """Return the label of the next token for each token. The last token has none."""
    return F.pad(labels[1:], (0, 1), value=IGNORE_INDEX)
