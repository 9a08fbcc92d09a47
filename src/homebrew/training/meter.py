"""Turns the clock and the counts of a run into the figures of a step."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from homebrew.training.metrics import StepMetrics, memory_bytes, peak_flops


class StepMeter:
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
        self._began = self._reported = time.perf_counter()
        self._step = step

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out time in which no step is taken: compiling, an evaluation, a save, callbacks; one may do another."""
        began, reported = time.perf_counter(), self._reported
        try:
            yield
        finally:
            self._reported = reported + time.perf_counter() - began

    def measure(self, step: int, *, loss: float, grad_norm: float, learning_rate: float) -> StepMetrics:
        """The figures at `step`, its throughput being that since the last call.

        Args:
            step: steps taken.
            loss: of the last one, in nats.
            grad_norm: before clipping.
            learning_rate: of the first parameter group.
        """
        now = time.perf_counter()
        tokens_per_second = self._tokens_per_step * (step - self._step) / max(now - self._reported, 1e-9)
        self._reported, self._step = now, step
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
            elapsed_seconds=now - self._began,
        )
