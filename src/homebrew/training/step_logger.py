"""Reads the results of steps one step late, so that the host does not wait for the device."""

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
    """Collects the results of steps, emits `on_log` and `on_step_skipped`, and raises the error that ends the run.

    Reading a number from a GPU makes the host wait until the GPU has computed it. Results are therefore copied to
    pinned host memory asynchronously, at every logged step, and read after the next step has been launched.

    Args:
        guard: Guard that has checked the steps.
        meter: Measures throughput between two logged steps.
        device: Device of the results.
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
        self._on_device: list[tuple[int, Tensor]] = []  # results whose copy has not been started
        self._copying: list[tuple[int, Tensor]] = []  # results that are being copied to the host
        self._log_due: tuple[int, float] | None = None  # the step to log from `_copying`, and its learning rate
        self._latest = float("nan"), float("nan")  # loss and gradient norm of the last result read
        self._error: NonFiniteError | None = None
        self._meter.start(step)

    def submit(self, step: int, result: Tensor, learning_rate: float, emit: Emit) -> None:
        """Log the previous logged step; then start copying the results if this step is to be logged.

        Args:
            step: Number of optimizer steps taken, including this one.
            result: What the guard returned for this step, on the device.
            learning_rate: The learning rate of this step.
            emit: Receives `on_log` and `on_step_skipped`.

        Raises:
            NonFiniteError: A step's result ends the run.
        """
        self._on_device.append((step, result))
        self._log(emit)
        if step == 1 or step % self._log_every == 0 or step >= self._max_steps:
            self._request()
            self._meter.mark()
            self._log_due = step, learning_rate

    def flush(self, emit: Emit) -> None:
        """Wait for the device, and handle the results of all steps.

        Args:
            emit: Receives `on_log` and `on_step_skipped`.

        Raises:
            NonFiniteError: A step's result ends the run. Further calls raise it again until the next run.
        """
        self._log(emit)
        self._request()
        self._log(emit)

    def cancel(self) -> None:
        """Drop the pending log entry, at the end of a run."""
        self._log_due = None

    def paused(self) -> AbstractContextManager[None]:
        """Return a context manager whose time does not count as training time."""
        return self._meter.paused()

    def _request(self) -> None:
        """Start copying the results to the host."""
        if not self._on_device:
            return
        steps, results = zip(*self._on_device, strict=True)
        # On CUDA, into pinned memory, so that the copy is asynchronous.
        rows = torch.stack(results).to("cpu", non_blocking=self._copied is not None)
        self._copying += zip(steps, rows, strict=True)
        self._on_device = []
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self._device))

    def _log(self, emit: Emit) -> None:
        """Wait for the copy of the results, emit events, and raise the error that ends the run."""
        rows, self._copying = self._copying, []
        if rows and self._copied is not None:
            self._copied.synchronize()
        skipped: list[SkippedStep] = []
        for step, result in rows:
            numbers = result.tolist()
            self._latest = numbers[2], numbers[3]
            skipped_step, self._error = self._guard.handle(step, numbers)
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
