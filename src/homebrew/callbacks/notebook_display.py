"""`NotebookDisplay`: shows training progress in a notebook, in one output that is updated in place."""

import os
import time
from html import escape
from typing import Any

from homebrew.callbacks.curve_svg import Point, add_point, draw_curves
from homebrew.metrics.step_metrics import EvalMetrics, StepMetrics

_REFRESH_SECONDS = 0.5
_MAX_ROWS = 5
_MAX_LINES = 12


class NotebookDisplay:
    """One output of a notebook's cell: the run, a progress bar, the loss curve, the last rows, and the last messages.

    HTML and SVG only, without scripts and style sheets, so that a saved notebook and any front end show the same.
    Where HTML is not supported, the output is plain text.

    It also works in a process forked from the notebook's, as by Accelerate's `notebook_launcher`.

    Args:
        summary: Description of the run.
        waiting: Text next to the bar until there is a row.
        step: The step at which the run starts.
        max_steps: The run's last step.
    """

    def __init__(self, summary: str, waiting: str, step: int, max_steps: int) -> None:
        from IPython.display import DisplayHandle

        self._summary = summary
        self._step, self._max_steps = step, max_steps
        self._status = waiting
        self._header: list[str] = []
        self._rows: list[list[str]] = []
        self._lines: list[str] = []
        self._training: list[Point] = []
        self._validation: list[Point] = []
        self._has_ended = False
        self._refreshed_at = time.monotonic()
        _allow_forked_process()
        self._handle: Any = DisplayHandle()  # type: ignore[no-untyped-call]
        self._handle.display(self._content(), raw=True)  # type: ignore[no-untyped-call]

    def print(self, line: str) -> None:
        """Add a message; the last ones are shown."""
        self._lines = [*self._lines, line][-_MAX_LINES:]
        self._refresh()

    def on_step(self, step: int) -> None:
        """Move the bar."""
        self._step = step
        self._refresh()

    def on_log(self, metrics: StepMetrics, cells: list[tuple[str, str]]) -> None:
        """Add a row, and a point to the curve."""
        self._header = [name for name, _ in cells]
        row = [f"{metrics.step:,}", *(value for _, value in cells[1:])]  # the last step is next to the bar
        self._rows = [*self._rows, row][-_MAX_ROWS:]
        add_point(self._training, metrics.step, metrics.loss)
        self._status = f"{cells[-1][0]} {cells[-1][1]}"
        self._refresh()

    def on_evaluate(self, metrics: EvalMetrics, line: str) -> None:
        """Add a message, and a point to the curve."""
        add_point(self._validation, metrics.step, metrics.loss)
        self.print(line)

    def stop(self) -> None:
        """Show everything. What is printed later is shown at once."""
        self._status, self._has_ended = "", True
        self._refresh()

    def _refresh(self) -> None:
        now = time.monotonic()
        if self._has_ended or now - self._refreshed_at > _REFRESH_SECONDS:
            self._refreshed_at = now
            self._handle.update(self._content(), raw=True)

    def _content(self) -> dict[str, str]:
        """Return the output by MIME type."""
        return {"text/html": self._html(), "text/plain": self._text()}

    def _text(self) -> str:
        rows = [" | ".join(map(" ".join, zip(self._header, row, strict=True))) for row in self._rows]
        return "\n".join([self._summary, self._position(), *rows, *self._lines])

    def _html(self) -> str:
        bar = (
            '<div style="display:flex;align-items:center;flex-wrap:wrap;gap:0 .7em">'
            f'<progress value="{self._step}" max="{self._max_steps}" style="flex:0 1 22em;min-width:5em"></progress>'
            f'<span style="white-space:nowrap">{escape(self._position())}</span></div>'
        )
        parts = [
            f'<div style="opacity:.75;margin-bottom:.5em;white-space:pre-line">{escape(self._summary)}</div>',
            bar,
            draw_curves(self._training, self._validation),
            self._table(),
            *(f'<div style="white-space:pre-wrap">{escape(line)}</div>' for line in self._lines),
        ]
        return f'<div style="font-size:13px;line-height:1.5;max-width:560px">{"".join(parts)}</div>'

    def _position(self) -> str:
        percent = f"{self._step / self._max_steps:.0%}"
        return " · ".join(filter(None, [f"step {self._step:,} / {self._max_steps:,}", percent, self._status]))

    def _table(self) -> str:
        if not self._rows:
            return ""
        style = 'style="text-align:right;white-space:nowrap;padding:1px 8px 1px 0"'
        header = "".join(f"<th {style}>{escape(name)}</th>" for name in self._header)
        body = "".join(
            f"<tr>{''.join(f'<td {style}>{escape(value)}</td>' for value in row)}</tr>" for row in self._rows
        )
        return (
            '<div style="overflow-x:auto;margin:.3em 0"><table style="border-collapse:collapse;margin:0;'
            f'font-variant-numeric:tabular-nums"><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></div>'
        )


def _allow_forked_process() -> None:
    """Let a forked process update outputs.

    The kernel forwards messages from forked processes, and does so for what they print; its session refuses to send
    them from a process other than the one that it was created in.
    """
    from IPython import get_ipython

    session = getattr(getattr(get_ipython(), "display_pub", None), "session", None)
    if session is not None:
        session.pid = os.getpid()
