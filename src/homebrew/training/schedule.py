"""Learning-rate schedules: pure functions of the step, with nothing to save or restore."""

import math
from dataclasses import dataclass
from typing import Any, Protocol

from homebrew.errors import ConfigError


class Schedule(Protocol):
    """A function from the step, counted from 0, to the multiplier of the learning rate."""

    def __call__(self, step: int) -> float:
        """Return the multiplier at `step`."""


_MAX_LEARNING_RATE = 3.4028234663852886e38
"""The largest number of float32, the precision of the weights. The command line's --help does not import PyTorch."""


def multiplier_at(schedule: Schedule, step: int, peak: float = 1.0) -> float:
    """Return a schedule's multiplier at a step.

    Args:
        schedule: Schedule, which can be a custom function.
        step: Step, counted from 0.
        peak: Largest learning rate that is multiplied.

    Raises:
        ConfigError: The schedule raised an exception, did not return a finite number of at least 0, or its product
            with the learning rate overflows.
    """
    try:
        value: Any = schedule(step)
    except Exception as error:
        raise ConfigError(
            f"schedule({step}) raised {error!r:.200}: it must return the multiplier of the learning rate at every "
            f"step. Correct the schedule."
        ) from error
    try:
        multiplier = math.nan if isinstance(value, bool | str | bytes) else float(value)
    except (TypeError, ValueError, ArithmeticError, RuntimeError):  # a RuntimeError for a tensor of several numbers
        multiplier = math.nan
    if not 0.0 <= multiplier < math.inf:
        raise ConfigError(
            f"schedule({step}) returned {value!r:.100}: it must return the multiplier of the learning rate, a finite "
            f"number of at least 0. Correct the schedule."
        )
    if not peak * multiplier <= _MAX_LEARNING_RATE:
        raise ConfigError(
            f"schedule({step}) returned {multiplier:g}: the learning rate, this times lr={peak:g}, is not finite. "
            f"Correct the schedule or the optimizer's lr."
        )
    return multiplier


@dataclass(frozen=True)
class WarmupCosine:
    """Linear warm-up, then a half cosine down to a floor (Brown et al. 2020, GPT-3).

    Args:
        warmup_steps: Number of warm-up steps; the multiplier at step s is (s + 1) / `warmup_steps`.
        max_steps: Step at which the floor is reached; the multiplier stays there.
        min_lr_ratio: The floor, as a fraction of the peak.

    Raises:
        ConfigError: A value is out of range, or the warm-up is longer than the run.
    """

    warmup_steps: int
    max_steps: int
    min_lr_ratio: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_steps <= self.max_steps:
            raise ConfigError(
                f"warmup_steps={self.warmup_steps}: must be at least 0 and at most max_steps={self.max_steps}."
            )
        _check_fraction("min_lr_ratio", self.min_lr_ratio)

    def __call__(self, step: int) -> float:
        """Return the multiplier at `step`."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if step >= self.max_steps:
            return self.min_lr_ratio
        progress = (step - self.warmup_steps) / (self.max_steps - self.warmup_steps)
        return self.min_lr_ratio + (1.0 - self.min_lr_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class WarmupStableDecay:
    """Linear warm-up, a constant phase, then a linear decay to a floor (Hu et al. 2024, MiniCPM).

    Until the decay starts, the multiplier does not depend on `max_steps`, so that a run can be extended from there.

    Args:
        warmup_steps: Number of warm-up steps; the multiplier at step s is at most (s + 1) / `warmup_steps`. Can be more
            than `max_steps`, for a run that will be extended.
        max_steps: Step at which the floor is reached; the multiplier stays there.
        decay_fraction: Length of the decay, as a fraction of `max_steps`. With 1, the decay starts at step 0; with 0,
            there is none.
        min_lr_ratio: The floor, as a fraction of the peak.

    Raises:
        ConfigError: A value is out of range.
    """

    warmup_steps: int
    max_steps: int
    decay_fraction: float
    min_lr_ratio: float = 0.0

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ConfigError(f"warmup_steps={self.warmup_steps}: must be at least 0.")
        _check_fraction("decay_fraction", self.decay_fraction)
        _check_fraction("min_lr_ratio", self.min_lr_ratio)

    @property
    def decay_start(self) -> int:
        """Last step that has the multiplier of a run with more steps."""
        return math.floor(self.max_steps - self.decay_fraction * self.max_steps)

    def __call__(self, step: int) -> float:
        """Return the multiplier at `step`."""
        warmup = (step + 1) / self.warmup_steps if step < self.warmup_steps else 1.0
        decay_steps = self.decay_fraction * self.max_steps
        remaining = max(0, self.max_steps - step)
        decay = remaining / decay_steps if remaining < decay_steps else 1.0
        return min(warmup, self.min_lr_ratio + (1.0 - self.min_lr_ratio) * decay)


def _check_fraction(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ConfigError(f"{name}={value!r}: must be between 0 and 1.")


def warmup_cosine(*, warmup_steps: int, max_steps: int, min_lr_ratio: float = 0.1) -> Schedule:
    """Return a linear warm-up followed by a half cosine down to a floor; see `WarmupCosine`."""
    return WarmupCosine(warmup_steps, max_steps, min_lr_ratio)


def warmup_stable_decay(
    *, warmup_steps: int, max_steps: int, decay_fraction: float = 0.3, min_lr_ratio: float = 0.0
) -> Schedule:
    """Return a linear warm-up, a constant phase and a linear decay; see `WarmupStableDecay`."""
    return WarmupStableDecay(warmup_steps, max_steps, decay_fraction, min_lr_ratio)
