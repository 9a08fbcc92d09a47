"""Train once, and record the validation loss and the seconds of training at each evaluation.

The seconds are those of the Trainer's throughput meter, which reads the GPU's own clock and leaves out evaluations and
the compilation before the first step. In the steps up to the first evaluation, the optimizer's kernels are still
compiled and CUDA graphs are captured, so each of these steps counts as the mean of the later steps. A run's total is
thus its number of steps times the mean time of a step after the first evaluation.
"""

import gc
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from harness import ON_GPU
from implementations import IsolatedAccelerate, StopTraining

from homebrew import GPT, Callback, EvalMetrics, StepMetrics, TokenDataset, Trainer, TrainerConfig


def train_and_record(model: GPT, train: TokenDataset, val: TokenDataset, config: TrainerConfig) -> dict[str, Any]:
    """Train once without checkpoints. Return the measured fields of `learning_curves.Run`.

    `config.log_every` has to be `config.eval_every`.
    """
    recorder = _Recorder()
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    try:
        with suppress(StopTraining), IsolatedAccelerate():
            Trainer(model, train, val, config=config, callbacks=[recorder], progress=False).train(overwrite=True)
    finally:
        if ON_GPU:
            torch.compiler.reset()  # frees compiled code and the memory of CUDA graphs
            gc.collect()
            torch.cuda.empty_cache()
    steps, losses = list(recorder.losses), list(recorder.losses.values())
    seconds = training_seconds(recorder.log, untimed_steps=steps[0])
    timed = [seconds[step] for step in steps]
    return {"steps": steps, "losses": losses, "seconds": timed, "peak_bytes": recorder.peak_bytes}


def training_seconds(log: Sequence[tuple[int, float]], *, untimed_steps: int) -> dict[int, float]:
    """Return the seconds of training from step 0 to each logged step.

    Args:
        log: Logged steps, each with the seconds since the previous logged step.
        untimed_steps: Number of first steps whose time includes compilation. Each counts as the mean of the later
            steps. It must be a logged step, and not the last.
    """
    timed = sum(seconds for step, seconds in log if step > untimed_steps)
    per_step = timed / (log[-1][0] - untimed_steps)
    total, result = untimed_steps * per_step, {}
    for step, seconds in log:
        if step > untimed_steps:
            total += seconds
        result[step] = total if step > untimed_steps else step * per_step
    return result


class _Recorder(Callback):
    """Records validation losses and the time between evaluations."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}
        self.log: list[tuple[int, float]] = []
        """Logged steps, each with the seconds since the previous one."""
        self.peak_bytes: int | None = None
        self._num_tokens = 0

    def on_log(self, trainer: Trainer, metrics: StepMetrics) -> None:
        self.log.append((metrics.step, (metrics.num_tokens - self._num_tokens) / metrics.tokens_per_second))
        self._num_tokens = metrics.num_tokens
        self.peak_bytes = metrics.memory_bytes

    def on_evaluate(self, trainer: Trainer, metrics: EvalMetrics) -> None:
        self.losses[metrics.step] = metrics.loss
        if metrics.step == trainer.config.max_steps:
            raise StopTraining
