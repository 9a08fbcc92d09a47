"""Draws the curves of runs: loss, learning rate, gradient norm and tokens/s.

Figures are made without pyplot, so neither its backend nor its settings are used or changed.
"""

import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from homebrew.errors import ConfigError
from homebrew.plotting.curve_points import Floats, smoothed, visible_points
from homebrew.plotting.panels import LOSS, PANELS, Panel, scale_x, scale_y, x_unit
from homebrew.plotting.run_labels import run_labels
from homebrew.plotting.run_record import RunRecord, XAxis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

COLORS = ("#3b82f6", "#f59e0b", "#10b981", "#ef4444", "#a855f7", "#06b6d4", "#ec4899", "#84cc16")
"""Colors of the runs, for a light and a dark background."""
DASHES = ("solid", (0, (6, 1.5, 1, 1.5)), (0, (1, 1.2)))
"""Line styles of the runs: the first eight runs have the first style and different colors, and so on. Validation losses
are dashed."""
MAX_RUNS = len(COLORS) * len(DASHES)

_STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.2,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # a name may contain dollar signs
}
_TEXT_COLORS = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
_PLACEHOLDER = "#010203"
"""Placeholder for the page's text color, which is not known when the figure is drawn."""
_MAX_MARKS = 500
_MAX_POINTS_WITH_MARKERS = 40


def curves_image(
    runs: Sequence[RunRecord], *, kind: Literal["png", "svg"] = "png", x: XAxis = "steps", log_x: bool = False
) -> bytes:
    """Draw all curves of runs in one picture.

    Args:
        runs: At most `MAX_RUNS` runs.
        kind: Format of the picture.
        x: Unit of the x-axis.
        log_x: Whether the x-axis is logarithmic.

    Raises:
        ConfigError: matplotlib is not installed, or there are too many runs.
    """
    labels = run_labels(runs)
    num_columns = max(1, min(len(runs), 150 // (max(map(len, labels)) + 8)))
    num_rows = math.ceil(len(runs) / num_columns)
    with _figure((12, 6.3 + 0.2 * num_rows), runs) as figure:
        axes = figure.subplot_mosaic([["loss", "lr"], ["loss", "norm"], ["loss", "speed"]], width_ratios=[1.6, 1])
        for panel, panel_axes in zip(PANELS, axes.values(), strict=True):
            _draw(panel_axes, panel, runs, x, log_x=log_x)
        if len(runs) == 1:
            figure.suptitle(labels[0], fontweight="bold")
        else:
            lines = [_line(**_run_style(index)) for index in range(len(runs))]
            names = [f"\N{THIN SPACE}{label}" for label in labels]  # matplotlib leaves out names that start with "_"
            figure.legend(lines, names, loc="outside lower center", ncols=num_columns)
        return _render(figure, kind)


def panel_svg(panel: Panel, runs: Sequence[RunRecord], *, x: XAxis = "steps", log_x: bool = False) -> str:
    """Draw one panel as an SVG element for a page, in the page's text color and without a background.

    Raises:
        ConfigError: matplotlib is not installed, or there are too many runs.
    """
    style = dict.fromkeys(_TEXT_COLORS, _PLACEHOLDER) | {
        "grid.alpha": 0.12,
        "savefig.transparent": True,
        "svg.hashsalt": panel.column,  # the ids of two panels differ
    }
    with _figure((4.8, 3.0), runs, style) as figure:  # small, so that its text is large enough on a phone
        _draw(figure.subplots(), panel, runs, x, log_x=log_x)
        svg = _render(figure, "svg").decode()
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg[svg.index("<svg") :])  # other panels have the same ids
    return svg.replace("<svg ", f'<svg role="img" aria-label="{panel.title}" ', 1).replace(_PLACEHOLDER, "currentColor")


@contextmanager
def _figure(
    size: tuple[float, float], runs: Sequence[RunRecord], style: dict[str, Any] | None = None
) -> "Iterator[Figure]":
    """Yield an empty figure in matplotlib's default style, changed by `_STYLE` and `style`."""
    if len(runs) > MAX_RUNS:
        raise ConfigError(f"{len(runs)} runs are too many for one plot. Pass at most {MAX_RUNS}.")
    try:
        import matplotlib.style
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "Plots need matplotlib, which is not installed. Run `pip install matplotlib`, or install homebrew with its "
            "extra `plot`."
        ) from error
    with matplotlib.style.context(["default", _STYLE | (style or {})]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a name in a script that the font does not have
        yield Figure(figsize=size, layout="constrained")


def _render(figure: "Figure", kind: Literal["png", "svg"]) -> bytes:
    buffer = io.BytesIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type")) if kind == "svg" else None
    figure.savefig(buffer, format=kind, dpi=140, metadata=metadata)
    return buffer.getvalue()


def _run_style(index: int) -> dict[str, Any]:
    return {"color": COLORS[index % len(COLORS)], "linestyle": DASHES[index // len(COLORS)], "linewidth": 1.5}


def _draw(axes: "Axes", panel: Panel, runs: Sequence[RunRecord], x: XAxis, *, log_x: bool) -> None:
    """Draw the curves of all runs in one panel, with its axes and marks."""
    unit, unit_name = x_unit(runs, x)
    shown = []  # the values that the axis has to include
    for index, run in enumerate(runs):
        style = _run_style(index)
        shown += _draw_steps(axes, panel, run, run.positions(x, run.steps["step"]) / unit, style, log_x=log_x)
        if panel is LOSS:
            positions = run.positions(x, run.evaluations["step"]) / unit
            shown += _draw_evaluations(axes, run, positions, style | {"color": _validation_color(index, runs)})
            _draw_skipped_steps(axes, run.positions(x, run.skipped["step"]) / unit, style["color"])
        for position in run.positions(x, run.resumes["step"])[:_MAX_MARKS] / unit:
            axes.axvline(position, color=style["color"], linestyle="dotted", linewidth=1)
    axes.set_title(panel.title)
    axes.set_xlabel(unit_name)
    scale_x(axes, log_x=log_x)
    scale_y(axes, panel, shown)
    if panel is LOSS:
        _add_line_legend(axes, runs)


def _draw_steps(
    axes: "Axes", panel: Panel, run: RunRecord, positions: Floats, style: dict[str, Any], *, log_x: bool
) -> list[Floats]:
    """Draw the curve of the logged steps, and return the values that the axis has to include."""
    values = run.steps[panel.column]
    curve = smoothed(values) if panel.is_noisy else values
    shown = [curve]
    if panel.is_noisy:
        axes.plot(*visible_points(positions, values, log_x=log_x), color=style["color"], alpha=0.25, linewidth=0.8)
        if len(finite := values[np.isfinite(values)]):
            shown.append(np.percentile(finite, [2, 98]))  # without the spikes
    axes.plot(*visible_points(positions, curve, log_x=log_x), **style, marker="." if len(values) == 1 else None)
    return shown


def _draw_evaluations(axes: "Axes", run: RunRecord, positions: Floats, style: dict[str, Any]) -> list[Floats]:
    """Draw the curve of the validation losses, and return them."""
    losses = run.evaluations["loss"]
    marker = "o" if len(losses) <= _MAX_POINTS_WITH_MARKERS else None
    axes.plot(positions, losses, **style | {"linestyle": "dashed"}, marker=marker, markersize=3.5)
    return [losses]


def _draw_skipped_steps(axes: "Axes", positions: Floats, color: str) -> None:
    """Mark skipped steps at the bottom."""
    if len(positions):  # matplotlib would make room for empty marks
        positions = positions[:: len(positions) // _MAX_MARKS + 1]
        heights, transform = np.full(len(positions), 0.02), axes.get_xaxis_transform()
        axes.plot(positions, heights, "x", color=color, markersize=5, transform=transform, clip_on=False)


def _validation_color(index: int, runs: Sequence[RunRecord]) -> str:
    """Return the run's own color, or another one if there is only one run."""
    return COLORS[index % len(COLORS) if len(runs) > 1 else 1]


def _add_line_legend(axes: "Axes", runs: Sequence[RunRecord]) -> None:
    """Explain the kinds of lines and marks that are in the panel."""
    color = COLORS[0] if len(runs) == 1 else "gray"
    num_skipped = sum(len(run.skipped) for run in runs)
    kinds = {"training": _line(color=color)}
    if any(len(run.evaluations) for run in runs):
        validation_color = COLORS[1] if len(runs) == 1 else color
        kinds["validation"] = _line(color=validation_color, linestyle="dashed", marker="o", markersize=3.5)
    if num_skipped:
        kinds[f"{num_skipped:,} skipped"] = _line(color=color, linestyle="", marker="x", markersize=5)
    if any(len(run.resumes) for run in runs):
        kinds["resumed"] = _line(color=color, linestyle="dotted")
    axes.legend(list(kinds.values()), list(kinds), loc="upper right")


def _line(**style: Any) -> "Line2D":  # noqa: ANN401 - matplotlib's
    from matplotlib.lines import Line2D

    return Line2D([], [], **style)
