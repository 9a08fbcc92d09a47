"""The state of an optimizer: tensors named after parameters, and plain numbers as JSON.

PyTorch's `get_optimizer_state_dict` and `set_optimizer_state_dict` are not used. If an optimizer has no state yet,
these functions take a step to create the state, which changes the numbers of some optimizers and the weights of others.
They also expect state for exactly the trainable parameters.
"""

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from homebrew.checkpoint.tensor_check import describe, is_savable
from homebrew.distributed.collectives import broadcast_tensors
from homebrew.distributed.fsdp import shard_like
from homebrew.errors import ConfigError, CorruptCheckpoint, ResumeMismatch
from homebrew.optim.combined import members, parameters_of

_SEPARATOR = "//"
_NOT_SAVED = ("params", "lr")
"""Keys of a parameter group that are not state: the schedule sets the learning rate at every step."""


def check_state(optimizer: torch.optim.Optimizer) -> None:
    """Raise ConfigError if an optimizer has state that a checkpoint cannot hold.

    Not supported are state in tensor subclasses, such as quantized moments; in tensors of other dtypes and layouts; in
    containers of tensors; under keys that are not valid strings; and in an inner optimizer.
    """
    for member in members(optimizer):
        _check_state(member)


def _check_state(optimizer: torch.optim.Optimizer) -> None:
    name = type(optimizer).__name__
    for values in optimizer.state.values():
        for key, value in values.items() if isinstance(values, dict) else ():
            if _holds_other_tensors(value):
                kind = describe(value) if isinstance(value, Tensor) else type(value).__name__
                raise ConfigError(
                    f"{name} keeps its state {key!r} in a {kind}, which a checkpoint cannot hold. Use an optimizer "
                    f"whose state is plain tensors and numbers."
                )
            if not isinstance(key, str) or key.encode(errors="ignore").decode() != key:
                raise ConfigError(
                    f"{name} keeps state under the key {key!r}, which a checkpoint cannot hold. Use a valid string."
                )
    for key, value in vars(optimizer).items():
        inner = [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.optim.Optimizer)]
        if any(other.state is not optimizer.state for other in inner):
            raise ConfigError(
                f"{name} keeps state in another optimizer, its attribute {key!r}, which a checkpoint does not hold. "
                f"Use an optimizer that keeps all state itself."
            )


def state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the tensors of every parameter's state, named `<parameter>//<key>`: not copied, and sharded under FSDP."""
    return {
        f"{name}{_SEPARATOR}{key}": value
        for name, values in _named_states(model, optimizer).items()
        for key, value in values.items()
        if isinstance(value, Tensor)
    }


def initial_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """Copy the state that an optimizer created when it was built, as Adagrad does, by parameter name.

    State with a step above 0 is from an earlier run and is not copied.
    """
    named = _named_states(model, optimizer)
    return {name: copy.deepcopy(values) for name, values in named.items() if not values.get("step")}


def group_settings(optimizer: torch.optim.Optimizer) -> list[dict[str, str]]:
    """Return the settings of each parameter group in a form that shows whether the optimizer has changed them.

    Tensors are not settings: an optimizer may change them in place, and they may be large.
    """
    return [
        {key: repr(value) for key, value in group.items() if key not in _NOT_SAVED and not isinstance(value, Tensor)}
        for group in optimizer.param_groups
    ]


def group_numbers(optimizer: torch.optim.Optimizer) -> list[dict[str, int | float]]:
    """Return the plain numbers in each parameter group. An optimizer may change some of them, such as step counts."""
    return [
        {key: value for key, value in group.items() if key not in _NOT_SAVED and isinstance(value, int | float)}
        for group in optimizer.param_groups
    ]


def optimizer_json(
    model: nn.Module, optimizer: torch.optim.Optimizer, initial: list[dict[str, str]]
) -> tuple[dict[str, Any], list[str]]:
    """Describe an optimizer's state: the shapes of its tensors, and all plain numbers, such as step counts.

    Group settings are saved only if they differ from `initial`, the `group_settings` before the first step.

    Returns:
        The state as JSON, and the keys of everything that is neither in it nor in `state_tensors`.
    """
    parameters: dict[str, dict[str, int | float | str | None]] = {}
    groups: list[dict[str, int | float | str | None]] = []
    unsaved = {str(key) for key in optimizer.state if not isinstance(key, Tensor)}
    for name, values in _named_states(model, optimizer).items():
        if numbers := {key: _to_json(value) for key, value in values.items() if isinstance(value, int | float | None)}:
            parameters[name] = numbers
        unsaved |= {key for key, value in values.items() if not isinstance(value, int | float | Tensor | None)}
    for group, before, now in zip(optimizer.param_groups, initial, group_settings(optimizer), strict=True):
        changed = {key: group[key] for key in now if now[key] != before.get(key)}
        groups.append({key: _to_json(value) for key, value in changed.items() if isinstance(value, int | float)})
        unsaved |= changed.keys() - groups[-1].keys()
        unsaved |= {key for key, value in group.items() if isinstance(value, Tensor) and key not in _NOT_SAVED}
    tensors = {name: list(tensor.shape) for name, tensor in state_tensors(model, optimizer).items()}
    return {"tensors": dict(sorted(tensors.items())), "parameters": parameters, "groups": groups}, sorted(unsaved)


def check_optimizer_state(
    path: Path, state: object, tensors: Mapping[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Check that a checkpoint has the optimizer state that was saved, and that this run's optimizer can load it.

    Args:
        path: Folder of the checkpoint.
        state: Any JSON value; valid if it is the result of `optimizer_json`.
        tensors: Contents of the optimizer's file.
        model: Model without wrappers.
        optimizer: Optimizer that will load the state.

    Raises:
        CorruptCheckpoint: The state is malformed, or is not the one that was saved.
        ResumeMismatch: The state belongs to parameters that the optimizer does not hold.
    """
    if not _is_optimizer_json(state, num_groups=len(optimizer.param_groups)):
        raise CorruptCheckpoint(f"{path / 'state.json'} does not hold the state of this run's optimizer.")
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    saved: dict[str, Any] = state["tensors"]  # type: ignore[index]  # it is a dictionary
    for name in sorted(saved.keys() | shapes.keys()):
        if saved.get(name) != shapes.get(name):
            raise CorruptCheckpoint(
                f"{path / 'optimizer.safetensors'}: {name} has shape {shapes.get(name)}, but {saved.get(name)} was "
                f"saved. Resume from another checkpoint."
            )
    held = set(map(id, parameters_of(optimizer)))
    parameters = {name: p for name, p in model.named_parameters() if id(p) in held}
    owners = {name.partition(_SEPARATOR)[0] for name in saved} | state["parameters"].keys()  # type: ignore[index]
    if unknown := sorted(owners - parameters.keys()):
        raise ResumeMismatch(
            f"{path} has optimizer state of {unknown[0]}, which this run's optimizer does not hold. Build the same "
            f"model and optimizer, and freeze the same parameters, as in the run that saved it."
        )
    fused = _fused_parameters(optimizer)
    for name, shape in shapes.items():  # PyTorch's kernels do not check shapes: a wrong one corrupts memory
        parameter = parameters[name.partition(_SEPARATOR)[0]]
        if id(parameter) in fused and shape and shape != list(parameter.shape):
            raise CorruptCheckpoint(f"{path / 'optimizer.safetensors'}: {name} does not have its parameter's shape.")


def load_optimizer_state(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    initial: Mapping[str, dict[str, Any]],
) -> None:
    """Replace an optimizer's state with saved state that `check_optimizer_state` has accepted; collective.

    State that belongs to no parameter is kept. Parameters without saved state get their initial state.

    Args:
        accelerator: The run's accelerator.
        model: Model without wrappers.
        optimizer: Optimizer without Accelerate's wrapper.
        tensors: Full tensors; used on rank 0 only.
        state: Result of `optimizer_json`, on every rank.
        initial: Result of `initial_state`, before the first step.
    """
    named = dict(model.named_parameters())
    indices = {id(p): i for i, p in enumerate(parameters_of(optimizer))}
    states: dict[str, dict[str, Any]] = {
        name: {key: _from_json(number) for key, number in numbers.items()}
        for name, numbers in state["parameters"].items()
    }
    for name, tensor in broadcast_tensors(accelerator, tensors):
        parameter, _, key = name.partition(_SEPARATOR)
        states.setdefault(parameter, {})[key] = shard_like(tensor, named[parameter])
    states = {name: copy.deepcopy(values) for name, values in initial.items() if name not in states} | states
    state_dict = optimizer.state_dict()
    kept = {key: values for key, values in state_dict["state"].items() if not isinstance(key, int)}
    state_dict["state"] = kept | {indices[id(named[name])]: values for name, values in states.items()}
    optimizer.load_state_dict(state_dict)  # moves tensors to the right device, but casts them to the weights' dtype
    fused = _fused_parameters(optimizer)
    for name, values in states.items():  # restore the saved dtypes: in bfloat16, a step count stops at 256
        weight, loaded = named[name], optimizer.state[named[name]]
        is_fused = id(weight) in fused
        for key, value in values.items():
            if isinstance(value, Tensor) and not (is_fused and _is_kernel_state(key, value, weight)):
                loaded[key] = value.to(loaded[key].device)
    for group, numbers in zip(optimizer.param_groups, state["groups"], strict=True):
        group.update({key: _from_json(number) for key, number in numbers.items()})


def _to_json(number: int | float | None) -> int | float | str | None:
    """Return a number as JSON, which has no NaN and no infinity: they become strings."""
    return str(float(number)) if isinstance(number, float) and not math.isfinite(number) else number


def _from_json(number: int | float | str | None) -> int | float | None:
    return float(number) if isinstance(number, str) else number


def _named_states(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """Return the state of each parameter that has one, by the parameter's name."""
    return {name: optimizer.state[p] for name, p in model.named_parameters() if p in optimizer.state}


def _holds_other_tensors(value: object) -> bool:
    """Return whether a value contains tensors but is not a plain tensor, or a sharded one, that can be saved."""
    if isinstance(value, Tensor) and (type(value) in (Tensor, nn.Parameter) or hasattr(value, "device_mesh")):
        return not is_savable(value)
    return any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))


def _fused_parameters(optimizer: torch.optim.Optimizer) -> set[int]:
    """Return the ids of the parameters that one of PyTorch's fused kernels updates."""
    return {id(p) for group in optimizer.param_groups if group.get("fused") for p in group["params"]}


def _is_kernel_state(key: str, value: Tensor, parameter: Tensor) -> bool:
    """Return whether a fused kernel may read a tensor, so that its dtype has to be the one that PyTorch chooses."""
    return key == "step" or (value.dim() > 0 and value.shape == parameter.shape)


def _is_optimizer_json(state: object, *, num_groups: int) -> bool:
    try:
        tensors, parameters, groups = (state[key] for key in ("tensors", "parameters", "groups"))  # type: ignore[index]
        numbers = [number for values in (*groups, *parameters.values()) for number in values.values()]
        return (
            isinstance(tensors, dict)
            and len(groups) == num_groups
            and not any(key in values for values in groups for key in _NOT_SAVED)
            and all(isinstance(number, int | float | None) or number in ("nan", "inf", "-inf") for number in numbers)
        )
    except (AttributeError, KeyError, TypeError):
        return False
