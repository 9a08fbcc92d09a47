"""Windows of consecutive tokens: where they start, and how they are split into two datasets."""

from numbers import Real

import torch
from torch import Tensor

from homebrew.errors import DataError
from homebrew.integers import SEED_RANGE, as_integer


def window_starts(num_tokens: int, block_size: int, stride: int | None) -> Tensor:
    """Return the position of the first token of each window of `block_size + 1` tokens, (num_windows,), int64.

    If `stride`, the distance between two starts, is None, it is `block_size`.
    """
    block_size = as_integer("block_size", block_size, error=DataError)
    stride = as_integer("stride", block_size if stride is None else stride, error=DataError)
    return torch.arange(0, max(0, num_tokens - block_size), stride)


def check_not_empty(starts: Tensor, num_tokens: int, block_size: int, source: str | None) -> None:
    """Raise DataError if there are no windows, because the `num_tokens` of `source` are fewer than one window needs."""
    if len(starts) == 0:
        raise DataError(
            f"There are {num_tokens} tokens in {source or 'the data'}, but one window needs block_size + 1 = "
            f"{block_size + 1}. Give more text, or use a smaller block_size."
        )


def split_starts(starts: Tensor, block_size: int, fraction: float, seed: int | None) -> tuple[Tensor, Tensor]:
    """Split windows into two sets that have no target in common.

    Args:
        starts: Result of `window_starts`, in any order.
        block_size: Number of targets of a window.
        fraction: Fraction of the windows in the first set.
        seed: Random seed for distributing the windows. If None, the text is cut in two, and windows that span the cut
            are left out.

    Raises:
        DataError: If an argument is not valid, a set would be empty, or the windows overlap and `seed` is not None.
    """
    if isinstance(fraction, bool) or not isinstance(fraction, Real):
        raise DataError(f"fraction={fraction!r:.100} is not valid. Use a number between 0 and 1.")
    if seed is not None:
        seed = as_integer("seed", seed, *SEED_RANGE, error=DataError)
    empty_error = DataError(
        f"fraction={fraction!r} of {len(starts)} windows leaves one of the two datasets empty. Choose a fraction "
        f"between 0 and 1, or give more text."
    )
    num_first = round(len(starts) * fraction) if 0 < fraction < 1 else 0
    if not 0 < num_first < len(starts):
        raise empty_error
    if seed is None:
        starts = starts.sort().values
        first, second = starts[:num_first], starts[num_first:]
        first = first[first + block_size <= second[0]]
        if not len(first):
            raise empty_error
        return first, second
    if bool((starts.diff().abs() < block_size).any()):
        raise DataError(
            "The windows overlap, so after a random split the model would be evaluated on tokens that it was "
            "trained on. Use split(fraction, seed=None), which cuts the text in two."
        )
    order = torch.randperm(len(starts), generator=torch.Generator().manual_seed(seed))
    return starts[order[:num_first]], starts[order[num_first:]]
