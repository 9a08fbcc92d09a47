"""The panels of a figure, one for each quantity, and their axes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from homebrew.plotting.curve_points import Floats
from homebrew.plotting.run_record import RunRecord, XAxis

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LOG_TICKS = (
    (1.0, 1.2, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0),
    (1.0, 1.5, 2.0, 3.0, 5.0, 7.0),
    (1.0, 2.0, 5.0),
    (1.0, 3.0),
)
_MAX_LOG_TICKS = 6


@dataclass(frozen=True)
class Panel:
    """One quantity in a figure."""

    title: str
    column: str
    """Field of `StepMetrics`."""
    is_noisy: bool = False
    """Whether to smooth the curve, with the logged values faint behind it."""
    log_ratio: float = math.inf
    """The axis is logarithmic if the ratio of the largest to the smallest value is above this."""
    starts_at_zero: bool = False
    """Whether a linear axis starts at 0. If so, `log_ratio` compares the largest values of the runs."""


LOSS = Panel("Loss (nats per token)", "loss", is_noisy=True, log_ratio=2)
PANELS = (
    LOSS,
    Panel("Learning rate", "learning_rate", log_ratio=10, starts_at_zero=True),
    Panel("Gradient norm", "grad_norm", is_noisy=True, log_ratio=10),
    Panel("Tokens/s", "tokens_per_second", starts_at_zero=True),
)


def x_unit(runs: Sequence[RunRecord], x: XAxis) -> tuple[float, str]:
    """Return the unit of the x-axis, and its name."""
    if x != "seconds":
        return 1.0, x
    longest = max(float(run.steps["elapsed_seconds"][-1]) for run in runs)
    for seconds, name in ((3600.0, "hours"), (60.0, "minutes")):
        if longest > 3 * seconds:
            return seconds, f"{name} of training"
    return 1.0, "seconds of training"


def scale_x(axes: "Axes", *, log_x: bool) -> None:
    """Choose a linear or logarithmic x-axis."""
    if log_x:
        axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: short_number(value))


def scale_y(axes: "Axes", panel: Panel, curves: Sequence[Floats]) -> None:
    """Choose a linear or logarithmic axis that shows these curves."""
    from matplotlib.ticker import LogLocator, NullLocator

    curves = [finite for curve in curves if len(finite := curve[np.isfinite(curve)])]
    if curves:
        low = float(min(np.max(curve) if panel.starts_at_zero else np.min(curve) for curve in curves))
        high = float(max(np.max(curve) for curve in curves))
        if low > 0 and high / low > panel.log_ratio:
            margin = (high / low) ** 0.05
            low, high = low / (30 if panel.starts_at_zero else margin), high * margin
            axes.set_yscale("log")
            axes.set_ylim(low, high)
            axes.yaxis.set_major_locator(LogLocator(subs=_log_ticks(low, high)))
            axes.yaxis.set_minor_locator(NullLocator())
        elif panel.starts_at_zero:
            axes.set_ylim(0, 1.15 * max(float(np.percentile(curve, 98)) for curve in curves) or None)
        elif high > low:
            margin = 0.05 * (high - low)
            axes.set_ylim(low - margin, high + margin)
    axes.yaxis.set_major_formatter(lambda value, _: short_number(value))


def _log_ticks(low: float, high: float) -> tuple[float, ...]:
    """Return the multiples of powers of ten that get a tick: as many as there is room for."""
    powers = 10.0 ** np.arange(math.floor(math.log10(low)), math.ceil(math.log10(high)))
    for multiples in _LOG_TICKS:
        ticks = np.outer(powers, multiples)
        if ((low <= ticks) & (ticks <= high)).sum() <= _MAX_LOG_TICKS:
            return multiples
    return (1.0,)


def short_number(value: float) -> str:
    """Format a number in a few characters: 12500 as "12.5k", 3e9 as "3B"."""
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{suffix}"
    return f"{value:.3g}".replace("e-0", "e-")
