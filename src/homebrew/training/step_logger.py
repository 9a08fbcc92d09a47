"""Logs steps without making the host wait for the device."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from homebrew.metrics.throughput import ThroughputMeter
from homebrew.training.nan_guard import NanGuard

if TYPE_CHECKING:
    from homebrew.errors import NonFiniteError
    from homebrew.metrics.step_metrics import SkippedStep

Emit = Callable[[str, object], None]
"""Calls a method of every callback: `emit("on_log", metrics)`."""


class StepLogger:
    """Collects the verdicts of steps and emits `on_log` and `on_step_skipped` from them, one step late.

    Reading a number from a GPU waits for it. So the verdicts of the steps up to a logged one are copied to pinned host
    memory asynchronously, and read only after the next step has been launched.

    Args:
        guard: Judges the steps; reviews their verdicts here.
        meter: Measures throughput between two logged steps.
        device: Device of the verdicts.
        log_every: Number of steps between two logged steps; the first step of a run is logged too.
        max_steps: The run's last step, which is always logged.
    """

    def __init__(
        self,
        guard: NanGuard,
        meter: ThroughputMeter,
        device: torch.device,
        *,
        log_every: int,
        max_steps: int,
    ) -> None:
        self._guard = guard
        self._meter = meter
        self._device = device
        self._log_every = log_every
        self._max_steps = max_steps
        self._copied = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self.start(0)

    def start(self, step: int) -> None:
        """Start at `step`, at the beginning of a run.

        Args:
            step: Number of optimizer steps taken so far.
        """
        self._on_device: list[tuple[int, Tensor]] = []  # verdicts not yet requested
        self._on_the_way: list[tuple[int, Tensor]] = []  # verdicts whose copy has been started
        self._log_due: tuple[int, float] | None = None  # the logged step among these, and its learning rate
        self._latest = float("nan"), float("nan")  # loss and gradient norm of the last verdict read
        self._error: NonFiniteError | None = None
        self._meter.start(step)

    def submit(self, step: int, verdict: Tensor, learning_rate: float, emit: Emit) -> None:
        """Log the step requested last; then request this one's numbers if it is due.

        Args:
            step: Number of optimizer steps taken, including this one.
            verdict: What the guard returned for this step, on the device.
            learning_rate: The learning rate of this step.
            emit: Receives `on_log` and `on_step_skipped`.

        Raises:
            NonFiniteError: A reviewed step ends the run.
        """
        self._on_device.append((step - 1, verdict))
        self._log(emit)
        if step == 1 or step % self._log_every == 0 or step >= self._max_steps:
            self._request()
            self._meter.mark()
            self._log_due = step, learning_rate

    def flush(self, emit: Emit) -> None:
        """Wait for the device, and log and review everything up to the last step.

        Args:
            emit: Receives `on_log` and `on_step_skipped`.

        Raises:
            NonFiniteError: A reviewed step ends the run; also on every further call until the next run.
        """
        self._log(emit)
        self._request()
        self._log(emit)

    def cancel(self) -> None:
        """Drop the log entry that is due, at the end of a run that failed."""
        self._log_due = None

    def paused(self) -> AbstractContextManager[None]:
        """Return a context manager whose time does not count as training time."""
        return self._meter.paused()

    def _request(self) -> None:
        """Start copying the verdicts to the host."""
        if not self._on_device:
            return
        steps, verdicts = zip(*self._on_device, strict=True)
        # Into pinned memory on CUDA: neither the steps nor the host wait for the copy.
        rows = torch.stack(verdicts).to("cpu", non_blocking=self._copied is not None)
        self._on_the_way += zip(steps, rows, strict=True)
        self._on_device = []
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self._device))

    def _log(self, emit: Emit) -> None:
        """Read the requested verdicts, waiting for their copy; emit events; raise the error that ends the run."""
        rows, self._on_the_way = self._on_the_way, []
        if rows and self._copied is not None:
            self._copied.synchronize()
        skipped: list[SkippedStep] = []
        for step, verdict in rows:
            numbers = verdict.tolist()
            self._latest = numbers[2], numbers[3]
            skipped_step, self._error = self._guard.review(step, numbers)
            skipped += [skipped_step] if skipped_step else []
            if self._error:
                self._on_device = []  # later steps were skipped because of this one
                break
        if skipped:
            emit("on_step_skipped", skipped)
        if self._error:
            raise self._error
        if self._log_due:
            (step, learning_rate), self._log_due = self._log_due, None
            loss, grad_norm = self._latest
            metrics = self._meter.measure(step, loss=loss, grad_norm=grad_norm, learning_rate=learning_rate)
            emit("on_log", metrics)
