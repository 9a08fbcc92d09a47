"""Whether a checkpoint may resume a run: the identity of a run, and the comparison of two."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from typing import Any, get_args

import torch
from torch.utils.data import Dataset

from homebrew.constants import Aspect
from homebrew.errors import ConfigError, ResumeMismatch
from homebrew.model.gpt import GPT
from homebrew.model.lora import base_fingerprint, lora_layers

Schedule = Callable[[int], float]  # as `training.schedule.Schedule`, which this layer cannot import
"""Maps a step to a multiplier of the learning rate."""

ASPECTS: tuple[Aspect, ...] = get_args(Aspect)

_NUM_PROBES = 16
_IMPLEMENTATION_OPTIONS = ("fused", "foreach", "capturable", "differentiable")
"""Optimizer options that change its speed, not its result, and differ between devices."""


def run_identity(
    *,
    dataset: Dataset[Any],
    model: GPT,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    max_steps: int,
    max_grad_norm: float,
    global_batch_size: int,
    seed: int,
) -> dict[str, Any]:
    """Return everything that determines a run's steps: one JSON value for each of `ASPECTS`.

    The schedule can be any function; it is identified by its learning rates at evenly spaced steps.

    Raises:
        ConfigError: The schedule does not return a number.
    """
    probes = sorted({max_steps * i // _NUM_PROBES for i in range(_NUM_PROBES + 1)})
    peaks = sorted({float(group["lr"]) for group in optimizer.param_groups})
    return {
        "dataset": getattr(dataset, "fingerprint", f"{len(dataset)} samples"),  # type: ignore[arg-type]
        "model": asdict(model.config),
        "adapter": _adapter(model),
        "optimizer": _optimizer_settings(optimizer) | {"max_grad_norm": max_grad_norm},
        "schedule": {
            "max_steps": max_steps,
            "learning rates": [[step, *(peak * _multiplier(schedule, step) for peak in peaks)] for step in probes],
        },
        "global_batch_size": global_batch_size,
        "seed": seed,
    }


def _optimizer_settings(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the class and each group's settings, without the learning rate and without state."""
    names = optimizer.defaults.keys() - {"lr", *_IMPLEMENTATION_OPTIONS}
    values = {name: [_canonical(group.get(name)) for group in optimizer.param_groups] for name in sorted(names)}
    return {"class": type(optimizer).__name__} | {name: ", ".join(strings) for name, strings in values.items()}


def _canonical(value: object) -> str:
    """Return a string that is the same for equal numbers of any type, and for tuples and lists."""
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_canonical, value))})"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return repr(float(value))
    return repr(value) if isinstance(value, str | bool | None) else type(value).__name__


def _multiplier(schedule: Schedule, step: int) -> float:
    value: Any = schedule(step)
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"schedule({step}) returned {value!r}: it must return a number, the multiplier of the learning rate."
        ) from error


def _adapter(model: GPT) -> dict[str, Any] | None:
    """Return the adapter's configuration and a fingerprint of its base model, or None without LoRA."""
    configs = [layer.config for layer in lora_layers(model).values()]
    if not configs:
        return None
    config = asdict(configs[0]) | {"target_modules": list(configs[0].target_modules)}
    return config | {"base_sha256": base_fingerprint(model)}


def check_identity(saved: object, ours: Mapping[str, Any], accept_changes: Collection[str]) -> None:
    """Check that a checkpoint belongs to this run: its `run_identity`, any JSON value, must equal this run's.

    Raises:
        ConfigError: `accept_changes` has an unknown aspect.
        ResumeMismatch: An aspect differs. The message names each difference, and how to resume anyway.
    """
    if unknown := sorted(set(accept_changes) - set(ASPECTS)):
        raise ConfigError(f"accept_changes={unknown!r}: must be among {', '.join(ASPECTS)}.")
    saved = saved if isinstance(saved, dict) else {}
    differing = [name for name in ASPECTS if saved.get(name) != ours[name] and name not in accept_changes]
    if differing:
        lines = ";\n  ".join(f"{name}: {_difference(saved.get(name), ours[name])}" for name in differing)
        raise ResumeMismatch(
            f"The checkpoint belongs to another run:\n  {lines}.\nUse the settings of that run, choose a new "
            f"output_dir, or accept the changes: train(resume=True, accept_changes={tuple(differing)!r}), or "
            f"`homebrew train {' '.join(f'--accept-changes {name}' for name in differing)}`."
        )


def _difference(saved: object, ours: object) -> str:
    if isinstance(saved, dict) and isinstance(ours, dict):
        keys = [key for key in (saved | ours) if saved.get(key) != ours.get(key)]
        return ", ".join(f"{key} {_difference(saved.get(key), ours.get(key))}" for key in keys)
    if _is_curve(saved) and _is_curve(ours):
        pairs = [(a, b) for a, b in zip(saved, ours, strict=False) if a != b]  # type: ignore[call-overload]
        if not pairs:
            return "differ in length"
        (step, *old), (_, *new) = pairs[0]
        old_rates, new_rates = (", ".join(f"{rate:.6g}" for rate in rates) for rates in (old, new))
        return f"first differ at step {step}: was {old_rates}, is {new_rates}"
    return f"was {saved!r}, is {ours!r}"


def _is_curve(value: object) -> bool:
    """Return whether a value is a list of [step, learning rates...]."""
    return isinstance(value, list) and all(
        isinstance(point, list) and point and all(isinstance(number, int | float) for number in point)
        for point in value
    )
