"""Whether a checkpoint belongs to this run: what must be the same for it to go on exactly."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from typing import Any, get_args

import torch
from torch.utils.data import Dataset

from homebrew.constants import Aspect
from homebrew.errors import ConfigError, ResumeMismatch
from homebrew.model.gpt import GPT
from homebrew.model.lora import base_fingerprint, lora_layers

Schedule = Callable[[int], float]
"""Step -> multiplier of the learning rate."""

ASPECTS: tuple[Aspect, ...] = get_args(Aspect)

_PROBES = 16
_HOW_NOT_WHAT = ("fused", "foreach", "capturable", "differentiable")
"""Settings of an optimizer that change its speed, and differ between devices."""


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
    """What decides a run's every step, one JSON value for each of `ASPECTS`.

    The schedule, any function of the step, is told by the learning rates it makes at evenly spaced steps.

    Raises:
        ConfigError: the schedule does not give a number.
    """
    probes = sorted({max_steps * i // _PROBES for i in range(_PROBES + 1)})
    peaks = sorted({float(group["lr"]) for group in optimizer.param_groups})
    return {
        "dataset": getattr(dataset, "fingerprint", f"{len(dataset)} samples"),  # type: ignore[arg-type]
        "model": asdict(model.config),
        "adapter": _adapter(model),
        "optimizer": _settings(optimizer) | {"max_grad_norm": max_grad_norm},
        "schedule": {
            "max_steps": max_steps,
            "learning rates": [[step, *(peak * _factor(schedule, step) for peak in peaks)] for step in probes],
        },
        "global_batch_size": global_batch_size,
        "seed": seed,
    }


def _settings(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Its class, and what its groups set; what else they hold is state, and the learning rate is the schedule's."""
    names = optimizer.defaults.keys() - {"lr", *_HOW_NOT_WHAT}
    found = {name: [_told(group.get(name)) for group in optimizer.param_groups] for name in sorted(names)}
    return {"class": type(optimizer).__name__} | {name: ", ".join(values) for name, values in found.items()}


def _told(value: object) -> str:
    """A setting in words that are the same for equal numbers of any type."""
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_told, value))})"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return repr(float(value))
    return repr(value) if isinstance(value, str | bool | None) else type(value).__name__


def _factor(schedule: Schedule, step: int) -> float:
    value: Any = schedule(step)
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"schedule({step}) is {value!r}: it must be the number the peak is multiplied by.") from error


def _adapter(model: GPT) -> dict[str, Any] | None:
    """What an adapter-only checkpoint relies on: the adapter's shape, and the base it belongs to."""
    configs = [layer.config for layer in lora_layers(model).values()]
    if not configs:
        return None
    shape = asdict(configs[0]) | {"target_modules": list(configs[0].target_modules)}
    return shape | {"base_sha256": base_fingerprint(model)}


def check_identity(saved: object, ours: Mapping[str, Any], accept_changes: Collection[str]) -> None:
    """Refuse to go on with what another run left.

    Args:
        saved: `run_identity` as the checkpoint holds it.
        ours: `run_identity` of this run.
        accept_changes: aspects that may differ.

    Raises:
        ConfigError: `accept_changes` names something else.
        ResumeMismatch: an aspect differs; the message names each, and how to go on.
    """
    if unknown := sorted(set(accept_changes) - set(ASPECTS)):
        raise ConfigError(f"accept_changes={unknown!r}: must be among {', '.join(ASPECTS)}.")
    saved = saved if isinstance(saved, dict) else {}
    differing = [name for name in ASPECTS if saved.get(name) != ours[name] and name not in accept_changes]
    if differing:
        lines = ";\n  ".join(f"{name}: {_difference(saved.get(name), ours[name])}" for name in differing)
        raise ResumeMismatch(
            f"The checkpoint belongs to another run:\n  {lines}.\nGive this run the same, use a new output_dir, or "
            f"go on knowingly with train(resume=True, accept_changes={tuple(differing)!r}). With `homebrew train`: "
            f"{' '.join(f'--accept-changes {name}' for name in differing)}."
        )


def _difference(saved: object, ours: object) -> str:
    if isinstance(saved, dict) and isinstance(ours, dict):
        keys = [key for key in (saved | ours) if saved.get(key) != ours.get(key)]
        return ", ".join(f"{key} {_difference(saved.get(key), ours.get(key))}" for key in keys)
    if isinstance(saved, list) and isinstance(ours, list):
        pairs = [(a, b) for a, b in zip(saved, ours, strict=False) if a != b]
        return f"first differ where {_short(pairs[0][0])} is now {_short(pairs[0][1])}" if pairs else "differ in length"
    return f"was {saved!r}, is {ours!r}"


def _short(value: object) -> str:
    """A step and its learning rates, to the digits that matter; anything else as it is."""
    if not (isinstance(value, list) and value and all(isinstance(number, int | float) for number in value)):
        return repr(value)
    return f"step {value[0]} has {', '.join(f'{rate:.6g}' for rate in value[1:])}"
