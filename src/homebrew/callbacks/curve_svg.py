"""`draw_curves`: draws the losses of a run as an SVG, for a notebook."""

import math

_MAX_POINTS = 500
_WIDTH, _HEIGHT = 480, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 24, 26, 26  # margins
_CURVES = (("training loss", "#3b82f6"), ("validation loss", "#f97316"))
"""Names and colors, which are readable on a light and on a dark background."""

Point = tuple[int, float]
"""A step and its loss."""


def add_point(curve: list[Point], step: int, loss: float) -> None:
    """Add a point to a curve. If it has too many, keep the first, every second one and the last."""
    if math.isfinite(loss):
        curve.append((step, loss))
    if len(curve) > _MAX_POINTS:
        curve[:] = [*curve[:-1:2], curve[-1]]


def draw_curves(training: list[Point], validation: list[Point]) -> str:
    """Return an SVG of the losses against the step, or an empty string if there are fewer than two points."""
    points = training + validation
    if len({step for step, _ in points}) < 2:
        return ""
    steps, losses = [step for step, _ in points], [loss for _, loss in points]
    first, last, low, high = min(steps), max(steps), min(losses), max(losses)
    margin = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    low, high = low - margin, high + margin

    def x(step: float) -> float:
        return _LEFT + (step - first) / (last - first) * (_WIDTH - _LEFT - _RIGHT)

    def y(loss: float) -> float:
        return _TOP + (high - loss) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [
        f'<path d="M{_LEFT} {y(value):.1f}H{_WIDTH - _RIGHT}" stroke="#808080" stroke-opacity=".3"/>'
        f'<text x="{_LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}</text>'
        for value in _ticks(low, high)
    ]
    parts.append(f'<text x="{_LEFT - 6}" y="{_HEIGHT - 8}" text-anchor="end">step</text>')
    parts += [
        f'<text x="{x(step):.1f}" y="{_HEIGHT - 8}" text-anchor="middle">{step:,.0f}</text>'
        for step in _ticks(first, last)
        if step == int(step)
    ]
    for number, ((name, color), curve) in enumerate(zip(_CURVES, (training, validation), strict=True)):
        if not curve:
            continue
        line = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in curve)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="1.5"/>')
        if curve is validation:
            parts += [f'<circle cx="{x(step):.1f}" cy="{y(loss):.1f}" r="3" fill="{color}"/>' for step, loss in curve]
        left = _LEFT + 150 * number
        parts.append(
            f'<path d="M{left} 10h16" stroke="{color}" stroke-width="3"/><text x="{left + 22}" y="14">{name}</text>'
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="loss curve" '
        'style="display:block;width:100%;height:auto;margin:.5em 0" font-family="sans-serif" font-size="12" '
        f'fill="currentColor">{"".join(parts)}</svg>'
    )


def _ticks(low: float, high: float) -> list[float]:
    """Return three to eight round numbers between two numbers."""
    largest = (high - low) / 3
    power = 10.0 ** math.floor(math.log10(largest))
    factors = (5, 2, 1, 0.5)  # 0.5, because the logarithm is rounded
    interval = next(factor * power for factor in factors if factor * power <= largest)
    multiples = range(math.ceil(low / interval), math.floor(high / interval) + 1)
    return [float(f"{k * interval:.9g}") for k in multiples]
