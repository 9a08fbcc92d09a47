"""Checks whether a run may resume from a checkpoint: the identity of a run, and the comparison of two identities."""

import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, get_args

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import Dataset

from homebrew.constants import Aspect
from homebrew.distributed.collectives import run_on_all
from homebrew.errors import ConfigError, DataError, LaunchError, ResumeMismatch
from homebrew.model.interfaces import interface_of
from homebrew.model.lora import base_fingerprint, lora_layers
from homebrew.optim.combined import members

Schedule = Callable[[int], float]  # same as `training.schedule.Schedule`, which this layer cannot import
"""Maps a step to a multiplier of the learning rate."""
Identity = Callable[[int], dict[str, Any]]
"""Maps a number of steps to everything that determines these steps: one JSON value for each of `ASPECTS`."""

ASPECTS: tuple[Aspect, ...] = get_args(Aspect)

_NUM_PROBES = 16
"""Number of learning rates that are saved for error messages."""

_NUM_HASHED = 1000
"""Number of steps, at the start and evenly spaced, whose learning rates are compared by hash."""

_NOT_SETTINGS = {"params", "param_names", "lr", "initial_lr", "fused", "foreach", "capturable", "differentiable"}
"""Keys of a parameter group that are compared elsewhere, or that change an optimizer's speed but not its result."""
_HARMLESS_KEYS: Mapping[Aspect, set[str]] = {
    "model": {"dropout", "n_head", "class", "config", "dtype"},
    "adapter": {"alpha", "base_sha256", "dropout"},
    "optimizer": {"betas", "eps", "max_grad_norm", "weight_decay"},
}
"""Settings that can change while the saved weights and optimizer state remain valid."""


def run_identity(
    *,
    dataset: Dataset[Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    max_steps: int,
    max_grad_norm: float,
    global_batch_size: int,
    seed: int,
    ema_decay: float | None = None,
) -> Identity:
    """Return a function that maps a number of steps to everything that determines these steps.

    The schedule can be any function; it is identified by its learning rates at the first and at evenly spaced steps.
    Only steps that have been taken count: a run can be extended if the learning rates of its past steps do not change.
    Therefore `max_steps` is not compared, but only shown as the usual reason for different learning rates.

    Raises:
        DataError: The dataset's `fingerprint` is not a string.
    """
    peaks = [float(group["lr"]) for group in optimizer.param_groups]
    peaks = peaks[:1] if len(set(peaks)) == 1 else peaks
    averaging = {} if ema_decay is None else {"ema_decay": _canonical(ema_decay)}
    constant = {
        "dataset": _fingerprint(dataset),
        "model": interface_of(model).description(),
        "adapter": _adapter(model),
        "optimizer": _optimizer_settings(model, optimizer) | {"max_grad_norm": _canonical(max_grad_norm)} | averaging,
        "global_batch_size": global_batch_size,
        "seed": seed,
    }
    return lambda num_steps: (
        constant | {"schedule": {"max_steps": max_steps} | _learning_rates(schedule, peaks, num_steps)}
    )


def _learning_rates(schedule: Schedule, peaks: Sequence[float], num_steps: int) -> dict[str, Any]:
    """Describe the learning rates of the first `num_steps` steps."""
    hashed = sorted({*range(min(num_steps, _NUM_HASHED)), *_evenly_spaced(num_steps, _NUM_HASHED)})
    probes = _evenly_spaced(num_steps, _NUM_PROBES)
    return {
        "learning rate": [[step, *(peak * schedule(step) for peak in peaks)] for step in probes],
        "multipliers": _hash([f"{schedule(step):.6g}" for step in hashed]),  # rounded, as math libraries differ
    }


def _evenly_spaced(num_steps: int, number: int) -> list[int]:
    """Return the first and the last of `num_steps` steps, and up to `number` - 1 steps between them."""
    return sorted({(num_steps - 1) * i // number for i in range(number + 1)}) if num_steps else []


def _hash(strings: Iterable[str]) -> str:
    return "#" + hashlib.sha256("\n".join(strings).encode()).hexdigest()[:8]


def _fingerprint(dataset: Dataset[Any]) -> str:
    fingerprint = getattr(dataset, "fingerprint", f"{len(dataset)} samples")  # type: ignore[arg-type]
    if not isinstance(fingerprint, str):
        raise DataError(
            f"train_dataset.fingerprint is {fingerprint!r:.100}, but must be a string that identifies the dataset's "
            f"samples. Change or remove the attribute."
        )
    return fingerprint


def _optimizer_settings(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the class, and each group's settings and parameters, without the learning rate."""
    names = {str(name) for group in optimizer.param_groups for name in group} - _NOT_SETTINGS
    values = {name: [_canonical(group.get(name)) for group in optimizer.param_groups] for name in sorted(names)}
    parameter_names = {id(parameter): name for name, parameter in model.named_parameters()}
    values["parameters"] = [
        _describe_names([parameter_names.get(id(parameter), "unknown") for parameter in group["params"]])
        for group in optimizer.param_groups
    ]
    return {"class": " and ".join(map(_class_name, members(optimizer)))} | {
        name: ", ".join(strings) for name, strings in values.items()
    }


def _class_name(optimizer: torch.optim.Optimizer) -> str:
    package = type(optimizer).__module__.partition(".")[0]
    return type(optimizer).__name__ if package == "torch" else f"{package}.{type(optimizer).__name__}"


def _describe_names(names: Collection[str]) -> str:
    """Return the number of names and a hash that does not depend on their order."""
    return f"{len(names)} tensors {_hash(sorted(names))}"


def _canonical(value: object) -> str:
    """Return a string that is the same for equal numbers of any type, and for tuples and lists."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_canonical, value))})"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return repr(float(value))
    return repr(value) if isinstance(value, str | bool | None) else type(value).__name__


def _adapter(model: nn.Module) -> dict[str, Any] | None:
    """Return the adapter's configuration and a fingerprint of its base model, or None without LoRA."""
    configs = [layer.config for layer in lora_layers(model).values()]
    if not configs:
        return None
    config = asdict(configs[0]) | {"target_modules": list(configs[0].target_modules)}
    return config | {"base_sha256": base_fingerprint(model)}


def check_accept_changes(accept_changes: Collection[str]) -> None:
    """Raise ConfigError unless every name is one of `ASPECTS`."""
    is_collection = isinstance(accept_changes, Collection) and not isinstance(accept_changes, str)
    if not is_collection or any(name not in ASPECTS for name in accept_changes):
        raise ConfigError(f"accept_changes={accept_changes!r}: must be a list of names among {', '.join(ASPECTS)}.")


def check_ranks(accelerator: Accelerator, identity: Mapping[str, Any]) -> None:
    """Check that all ranks have the same `run_identity`; collective.

    Otherwise the ranks' weights would diverge: gradients are averaged, but each rank applies its own optimizer.

    Raises:
        LaunchError: On every rank, if the identities differ.
    """
    first, *others = run_on_all(accelerator, lambda: identity)
    for rank, other in enumerate(others, start=1):
        if differing := [name for name in ASPECTS if first[name] != other[name]]:
            raise LaunchError(
                f"Rank {rank} has other settings than rank 0 ('was' is rank 0's):\n  "
                f"{_differences(differing, first, other)}.\nBuild the same Trainer on every rank."
            )


def check_identity(saved: Mapping[str, Any], ours: Mapping[str, Any], accept_changes: Collection[str]) -> set[Aspect]:
    """Check that a checkpoint belongs to this run: both must have the same `run_identity`.

    Args:
        saved: Identity in the checkpoint, which may be any JSON object.
        ours: Identity of this run.
        accept_changes: Aspects that may differ.

    Returns:
        The accepted aspects whose saved state is no longer valid.

    Raises:
        ResumeMismatch: An aspect differs and was not accepted, or the saved weights do not fit the model.
    """
    differing = [name for name in ASPECTS if _differ(saved.get(name), ours[name])]
    unfit = {name for name in _HARMLESS_KEYS if not _state_fits(name, saved.get(name), ours[name])}
    has_other_weights = not unfit.isdisjoint(("model", "adapter"))
    refused = [name for name in differing if name not in accept_changes]
    if refused or has_other_weights:
        # The optimizer of another model has other parameters, which says nothing new.
        is_implied = has_other_weights and differing_keys(saved.get("optimizer"), ours["optimizer"]) == ["parameters"]
        lines = _differences([name for name in differing if name != "optimizer" or not is_implied], saved, ours)
        options = "".join(f" --accept-changes {name}" for name in differing)
        is_longer = "max_steps" in differing_keys(saved.get("schedule"), ours["schedule"])
        guide = " See Train for longer in the guide on checkpoints." if is_longer else ""
        remedy = (
            "or choose a new output_dir: the saved weights do not fit this model."
            if has_other_weights
            else f"choose a new output_dir, or accept the changes: train(resume=True, "
            f"accept_changes={tuple(differing)!r}), or on the command line --resume{options}.{guide}"
        )
        raise ResumeMismatch(
            f"The checkpoint belongs to another run:\n  {lines}.\nUse the settings of that run, {remedy}"
        )
    return set(differing) - (_HARMLESS_KEYS.keys() - unfit)


def _state_fits(aspect: Aspect, saved: Any, ours: Any) -> bool:  # noqa: ANN401 - JSON values
    """Return whether saved state fits our settings: only `_HARMLESS_KEYS` differ, and have as many values as before.

    An optimizer with more betas, for example, has more state. The `config` of a transformers model may have more or
    fewer fields, because the names and shapes of the weights are compared as well.
    """
    keys = differing_keys(saved, ours)
    return _HARMLESS_KEYS[aspect].issuperset(keys) and all(
        key == "config" or str(saved.get(key)).count(",") == str(ours.get(key)).count(",") for key in keys
    )


def _differ(saved: object, ours: object) -> bool:
    return saved != ours and differing_keys(saved, ours) != ["max_steps"]  # max_steps only changes learning rates


def differing_keys(saved: object, ours: object) -> list[str]:
    """Return the keys whose values differ in two dictionaries; other JSON values count as empty."""
    saved, ours = (value if isinstance(value, dict) else {} for value in (saved, ours))
    return [key for key in saved | ours if saved.get(key) != ours.get(key)]


def _differences(names: Iterable[Aspect], saved: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    return ";\n  ".join(f"{name}: {_difference(saved.get(name), ours[name])}" for name in names)


def _difference(saved: object, ours: object) -> str:
    if isinstance(saved, dict) and isinstance(ours, dict):
        if saved.get("class") != ours.get("class"):  # other classes have other settings
            saved, ours = {"class": saved.get("class")}, {"class": ours.get("class")}
        differences = {key: _difference(saved.get(key), ours.get(key)) for key in differing_keys(saved, ours)}
        shown = [f"{key} {difference}" for key, difference in differences.items() if difference]
        return ", ".join(shown or [f"{key} differ" for key in differences])
    if isinstance(ours, str) and ours.startswith("#"):
        return ""  # a hash does not help the user
    if isinstance(ours, str) and re.fullmatch("[0-9a-f]{64}", ours):
        return "differs"  # a fingerprint
    if _is_curve(saved) and _is_curve(ours):
        return _curve_difference(saved, ours)  # type: ignore[arg-type]
    return f"was {saved!r}, is {ours!r}"


def _curve_difference(saved: list[list[float]], ours: list[list[float]]) -> str:
    """Compare two lists of [step, learning rates...] at the first step where they differ; "" if there is none."""
    for (step, *old), (our_step, *new) in zip(saved, ours, strict=False):
        if step == our_step and old != new:
            digits = 6 if [f"{rate:.6g}" for rate in old] != [f"{rate:.6g}" for rate in new] else 17
            old_rates, new_rates = (" and ".join(f"{rate:.{digits}g}" for rate in rates) for rates in (old, new))
            return f"at step {step} was {old_rates}, is {new_rates}"
    return ""


def _is_curve(value: object) -> bool:
    """Return whether a value is a list of [step, learning rates...]."""
    return isinstance(value, list) and all(
        isinstance(point, list) and point and all(isinstance(number, int | float) for number in point)
        for point in value
    )
