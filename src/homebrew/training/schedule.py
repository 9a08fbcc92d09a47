"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

import math
from dataclasses import dataclass
from typing import Protocol

from homebrew.errors import ConfigError


class Schedule(Protocol):
    """A function from the step, counted from 0, to the factor its learning rate is multiplied by."""

    def __call__(self, step: int) -> float: ...


@dataclass(frozen=True)
class WarmupCosine:
    """Linear warm-up, then half a cosine down to a floor, which it keeps (Brown et al. 2020, GPT-3).

    Args:
        warmup_steps: steps of warm-up; the factor at step s is (s + 1) / `warmup_steps`.
        max_steps: the step at which the floor is reached.
        min_lr_ratio: the floor, as a share of the peak.

    Raises:
        ConfigError: a number is out of range, or the warm-up is longer than the run.
    """

    warmup_steps: int
    max_steps: int
    min_lr_ratio: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_steps <= self.max_steps:
            raise ConfigError(
                f"warmup_steps={self.warmup_steps}: must be at least 0 and at most max_steps={self.max_steps}."
            )
        if not 0.0 <= self.min_lr_ratio <= 1.0:
            raise ConfigError(f"min_lr_ratio={self.min_lr_ratio!r}: must be between 0 and 1.")

    def __call__(self, step: int) -> float:
        """The factor at `step`."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if step >= self.max_steps:
            return self.min_lr_ratio
        progress = (step - self.warmup_steps) / (self.max_steps - self.warmup_steps)
        return self.min_lr_ratio + (1.0 - self.min_lr_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))


def warmup_cosine(*, warmup_steps: int, max_steps: int, min_lr_ratio: float = 0.1) -> Schedule:
    """Linear warm-up, then half a cosine down to a floor; see `WarmupCosine`."""
    return WarmupCosine(warmup_steps, max_steps, min_lr_ratio)
