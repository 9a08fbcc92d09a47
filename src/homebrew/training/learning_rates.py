"""The learning rates of an optimizer during a run: their peaks times the schedule's multiplier."""

import torch
from torch import Tensor

from homebrew.training.schedule import Schedule, multiplier_at
from homebrew.user_warnings import warn

_TINY_MULTIPLIER, _TINY_RATE = 1e-2, 1e-5
"""A run whose multipliers and learning rates are all smaller hardly learns anything."""


class LearningRates:
    """Sets the learning rate of each parameter group to its peak times the schedule's multiplier.

    A learning rate that is a tensor stays the same tensor: some optimizers require one, and compiled ones refer to it.

    Args:
        optimizer: Optimizer whose learning rates are the peaks, at the latest when `start` is called.
        schedule: Function from the step to the multiplier.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, schedule: Schedule) -> None:
        self._optimizer = optimizer
        self._schedule = schedule
        self.start()

    def start(self) -> None:
        """Take the current learning rates as the peaks."""
        self._peaks = [float(group["lr"]) for group in self._optimizer.param_groups]
        self._multiplier = 1.0  # that was set last

    def set(self, step: int) -> float:
        """Set the learning rates of a step. One that has changed since the last step is replaced with a warning.

        Returns:
            The learning rate of the first parameter group.

        Raises:
            ConfigError: As `multiplier_at`.
        """
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=False):  # `TrainStep` checks them
            # Not in a tensor, which may be on a GPU and would have to be waited for.
            if isinstance(group["lr"], float) and group["lr"] != peak * self._multiplier:
                warn(
                    "A callback or the optimizer has changed the learning rate, which the schedule sets before every "
                    "step. Pass a function from the step to the multiplier of the learning rate as the Trainer's "
                    "schedule."
                )
        self._multiply(multiplier_at(self._schedule, step, max(self._peaks)))
        return self._peaks[0] * self._multiplier

    def restore(self) -> None:
        """Set the learning rates to their peaks."""
        self._multiply(1.0)

    def _multiply(self, multiplier: float) -> None:
        self._multiplier = multiplier
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=False):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(peak * multiplier)
            else:
                group["lr"] = peak * multiplier


def warn_of_tiny_multipliers(optimizer: torch.optim.Optimizer, schedule: Schedule, max_steps: int) -> None:
    """Warn if a schedule seems to return the learning rate itself, or 0 at every step.

    Args:
        optimizer: Optimizer whose learning rates are multiplied.
        schedule: Function from the step to the multiplier, which is called for a hundred steps of the run.
        max_steps: Number of steps of the run.

    Raises:
        ConfigError: As `multiplier_at`.
    """
    peak = max(float(group["lr"]) for group in optimizer.param_groups)
    largest = max(multiplier_at(schedule, step, peak) for step in range(0, max_steps, max(1, max_steps // 100)))
    if largest < _TINY_MULTIPLIER and largest * peak < _TINY_RATE:
        warn(
            f"schedule returned at most {largest:g}, so the learning rate is at most {largest * peak:g}. The schedule "
            f"must return the multiplier of the optimizer's learning rate, {peak:g}, not the learning rate itself."
        )
