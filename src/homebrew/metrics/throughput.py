"""Turns the clock and the counts of a run into the figures of a step."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from homebrew.metrics.step_metrics import StepMetrics, memory_bytes, peak_flops


class ThroughputMeter:
    """Measures throughput between one report and the next.

    Args:
        tokens_per_step: over all processes.
        flops_per_token: forward and backward.
        device: of this process.
        dtype: in which the matrix products run.
        num_processes: devices that share a step.
    """

    def __init__(
        self,
        *,
        tokens_per_step: int,
        flops_per_token: int,
        device: torch.device,
        dtype: torch.dtype,
        num_processes: int,
    ) -> None:
        self._tokens_per_step = tokens_per_step
        self._flops_per_token = flops_per_token
        self._device = device
        peak = peak_flops(device, dtype)
        self._peak_flops = None if peak is None else peak * num_processes
        self.start(0)

    def start(self, step: int) -> None:
        """Begin at `step`, which is not counted."""
        self._began = self._reported = self._marked = _Stamp(self._device)
        self._step = step
        self._paused_seconds = 0.0

    def mark(self) -> None:
        """Note when the device will have done what it was given so far: the end of the step that is measured next."""
        self._marked = _Stamp(self._device)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out time in which no step is taken: compiling, an evaluation, a save; one may do another."""
        began, before = time.perf_counter(), self._paused_seconds
        try:
            yield
        finally:
            self._paused_seconds = before + time.perf_counter() - began

    def measure(self, step: int, *, loss: float, grad_norm: float, learning_rate: float) -> StepMetrics:
        """The figures at `step`, its throughput being that since the step measured before.

        Args:
            step: steps taken when it was marked.
            loss: of the last of them, in nats.
            grad_norm: before clipping.
            learning_rate: of the first parameter group.
        """
        seconds = self._marked.since(self._reported) - self._paused_seconds
        tokens_per_second = self._tokens_per_step * (step - self._step) / max(seconds, 1e-9)
        self._reported, self._step, self._paused_seconds = self._marked, step, 0.0
        mfu = self._peak_flops and tokens_per_second * self._flops_per_token / self._peak_flops
        return StepMetrics(
            step=step,
            loss=loss,
            learning_rate=learning_rate,
            grad_norm=grad_norm,
            tokens_per_second=tokens_per_second,
            mfu=mfu,
            memory_bytes=memory_bytes(self._device),
            num_tokens=step * self._tokens_per_step,
            elapsed_seconds=self._marked.since(self._began),
        )


class _Stamp:
    """A time on the device's clock: a GPU does its work later than it is given it."""

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        self._seconds = time.perf_counter()
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(device))

    def since(self, earlier: "_Stamp") -> float:
        """Seconds, once this time has come."""
        if self._event is None or earlier._event is None:
            return self._seconds - earlier._seconds
        self._event.synchronize()
        return float(earlier._event.elapsed_time(self._event)) / 1000
