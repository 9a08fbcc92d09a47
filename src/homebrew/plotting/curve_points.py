"""The points of a curve: smoothing, and selection of the visible points of a long curve."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_NUM_COLUMNS = 1000
"""Number of columns that a panel is divided into. matplotlib cannot draw all points of a long curve."""


def smoothed(values: Floats) -> Floats:
    """Return means over neighbors, about 2 % of the curve on each side, ignoring NaN. Near neighbors have more weight.

    Near the end, the right side has fewer neighbors. Near the beginning, where the loss falls fast, both sides do.
    """
    return _moving_mean(_moving_mean(values, len(values) // 80), len(values) // 80)


def _moving_mean(values: Floats, width: int) -> Floats:
    """Return the mean of each value and up to `width` neighbors on each side."""
    n = len(values)
    index = np.arange(n)
    start = index - np.minimum(index, width)
    stop = index + np.minimum(np.minimum(index, width), n - 1 - index) + 1
    is_number = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(is_number, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(is_number)])
    num = counts[stop] - counts[start]
    return np.where(num > 0, (sums[stop] - sums[start]) / np.maximum(num, 1), np.nan)


def visible_points(positions: Floats, values: Floats, *, log_x: bool) -> tuple[Floats, Floats]:
    """Return the visible points of a curve. In a long curve, these are the lowest and the highest of each column."""
    if len(values) <= 2 * _NUM_COLUMNS:
        return positions, values
    is_drawn = np.isfinite(positions) & np.isfinite(values) & (positions > 0)
    positions, values = positions[is_drawn], values[is_drawn]
    if not len(values):
        return positions, values
    x = np.log(positions) if log_x else positions
    columns = (x - x[0]) // max((x[-1] - x[0]) / _NUM_COLUMNS, 1e-300)
    order = np.lexsort((values, columns))
    last = np.flatnonzero(np.diff(columns[order]))  # positions of the highest points, except in the last column
    index = np.unique(np.concatenate([[0, len(x) - 1], order[[0, -1]], order[last], order[last + 1]]))
    return positions[index], values[index]
