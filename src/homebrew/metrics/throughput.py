"""`ThroughputMeter`: measures tokens/s and MFU between two logged steps."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from homebrew.metrics.hardware import peak_flops, peak_memory_bytes
from homebrew.metrics.step_metrics import StepMetrics


class ThroughputMeter:
    """Measures throughput between two logged steps, without synchronizing the device.

    `mark()` records the end of a step on the device's timeline when the step is launched. `measure()`, called once
    the device has finished that step, reads the time.

    Args:
        tokens_per_step: Tokens per optimizer step over all ranks.
        flops_per_token: Forward and backward FLOPs per token.
        dtype: Data type of the matrix products.
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
        """Start measuring after `step` steps. The first measurement does not include these steps."""
        self._started_at = self._measured_at = self._marked_at = _Timestamp(self._device)
        self._measured_step = step
        self._paused_seconds = 0.0

    def mark(self) -> None:
        """Record the end of the step that was just launched; `measure` uses this time."""
        self._marked_at = _Timestamp(self._device)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time spent in this context: compilation, evaluations, saves. Contexts may be nested."""
        start, paused_before = time.perf_counter(), self._paused_seconds
        try:
            yield
        finally:
            self._paused_seconds = paused_before + time.perf_counter() - start  # count only the outermost context

    def measure(self, step: int, *, loss: float, grad_norm: float, learning_rate: float) -> StepMetrics:
        """Return the metrics of the last marked step. `step` is the number of steps that had been taken at `mark`."""
        seconds = self._marked_at.seconds_since(self._measured_at) - self._paused_seconds
        tokens_per_second = self._tokens_per_step * (step - self._measured_step) / max(seconds, 1e-9)
        self._measured_at, self._measured_step, self._paused_seconds = self._marked_at, step, 0.0
        mfu = self._peak_flops and tokens_per_second * self._flops_per_token / self._peak_flops
        return StepMetrics(
            step=step,
            loss=loss,
            learning_rate=learning_rate,
            grad_norm=grad_norm,
            tokens_per_second=tokens_per_second,
            mfu=mfu,
            memory_bytes=peak_memory_bytes(self._device),
            num_tokens=step * self._tokens_per_step,
            elapsed_seconds=self._marked_at.seconds_since(self._started_at),
        )


class _Timestamp:
    """A point in time. On CUDA, it is when the device finishes the work queued so far; on other devices, now."""

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        self._seconds = time.perf_counter()
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(device))

    def seconds_since(self, earlier: "_Timestamp") -> float:
        """Return the seconds between two timestamps, waiting until the device has reached this one."""
        if self._event is None or earlier._event is None:
            return self._seconds - earlier._seconds
        self._event.synchronize()
        return float(earlier._event.elapsed_time(self._event)) / 1000
