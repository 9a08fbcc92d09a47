"""The state of a run as named CPU tensors: weights, optimizer, update guard and random states.

Names are those of the model without wrappers, whether it runs on one process or many, sharded or compiled;
`torch.distributed.checkpoint.state_dict` maps them. Functions that take an accelerator are collective.
"""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from homebrew.checkpoint.checkpoint_files import TensorFiles
from homebrew.checkpoint.rng_state import check_rng, restore_rng, rng_state
from homebrew.checkpoint.tensor_check import check_tensors
from homebrew.distributed.collectives import broadcast_bytes, gather_bytes
from homebrew.distributed.fsdp import uses_fsdp
from homebrew.errors import CorruptCheckpoint
from homebrew.model.gpt_config import EMBEDDING, LM_HEAD
from homebrew.model.lora import LoRALinear

_SEPARATOR = "//"
_NOT_SAVED = ("params", "lr")
"""Keys of a parameter group that are not state: the schedule sets the learning rate at every step."""


class Stateful(Protocol):
    """An object whose state is a flat dictionary of tensors."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state."""

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Restore the state."""


def checkpoint_bytes(model: nn.Module) -> int:
    """Return the size of a run's checkpoint in bytes: the weights, and two Adam moments of each trained one."""
    saved = 0 if _weights_name(model) == "adapter" else 1
    return sum(p.numel() * p.element_size() * (3 if p.requires_grad else saved) for p in model.parameters())


def gather_run(
    accelerator: Accelerator, wrapped: nn.Module, optimizer: torch.optim.Optimizer, guard: Stateful
) -> TensorFiles:
    """Copy the full state of a run to the CPU of rank 0; empty on other ranks."""
    files = gather_small_state(accelerator, guard)
    tensors = _tensors(accelerator, wrapped, optimizer, full=True)
    return files | _copy_to_cpu(tensors) if accelerator.is_main_process else {}


def gather_small_state(accelerator: Accelerator, guard: Stateful) -> TensorFiles:
    """Copy the update guard and every rank's random states to the CPU of rank 0; empty on other ranks."""
    states = gather_bytes(accelerator, save(rng_state()))
    if not accelerator.is_main_process:
        return {}
    return _copy_to_cpu({"guard": guard.state_dict()}) | {f"rng-{i}": load(state) for i, state in enumerate(states)}


def sharded_tensors(accelerator: Accelerator, wrapped: nn.Module, optimizer: torch.optim.Optimizer) -> TensorFiles:
    """Return weights and optimizer state as they are sharded: DTensors on the device, not copied."""
    return _tensors(accelerator, wrapped, optimizer, full=False)


def scatter_run(
    accelerator: Accelerator,
    wrapped: nn.Module,
    optimizer: torch.optim.Optimizer,
    guard: Stateful,
    files: TensorFiles,
    *,
    seed: int,
) -> None:
    """Restore the state of a run from rank 0's `files`, which `check_files` has accepted.

    Ranks without a saved random state are seeded with `seed`.
    """
    _scatter_weights(wrapped, files.get(_weights_name(wrapped), {}))
    _scatter_optimizer(accelerator, wrapped, optimizer, files.get("optimizer", {}))
    guard.load_state_dict(load(broadcast_bytes(accelerator, save(files.get("guard", {})))))
    for rank in range(accelerator.num_processes):
        state = broadcast_bytes(accelerator, save(files.get(f"rng-{rank}", {})))
        if rank == accelerator.process_index:
            if saved := load(state):
                restore_rng(saved)
            else:
                set_seed(seed, device_specific=True)


def reserve_staging(accelerator: Accelerator, model: nn.Module) -> None:
    """Allocate the pinned memory for `gather_run`'s copies ahead of the first save; does nothing without a GPU.

    Page-locking takes longer than a training step, and PyTorch caches pinned memory after it has been freed. Sharded
    tensors are gathered through memory that PyTorch allocates itself.
    """
    if accelerator.device.type == "cuda" and accelerator.is_main_process and not uses_fsdp(accelerator):
        trained = [p for p in model.parameters() if p.requires_grad]
        with contextlib.suppress(RuntimeError):  # not enough memory to lock: copies will be slower
            _ = [torch.empty(p.shape, dtype=p.dtype, pin_memory=True) for p in trained for _ in range(3)]


def check_files(path: Path, files: TensorFiles, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Check that a checkpoint has the tensors that the run needs, before any state is changed.

    Raises:
        CorruptCheckpoint: A file or tensor is missing, unknown, or of another shape or kind.
    """
    weights = _weights_name(model)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name in (weights, "optimizer", "guard", "rng-0"):
        if name not in files:
            raise CorruptCheckpoint(f"{path} has no {name}.safetensors, which this run needs.")
    saved = trained if weights == "adapter" else dict(model.named_parameters())
    check_tensors(path / f"{weights}.safetensors", files[weights], {name: tuple(p.shape) for name, p in saved.items()})
    states = files["optimizer"]
    if unknown := sorted({name.rpartition(_SEPARATOR)[0] for name in states} - trained.keys()):
        raise CorruptCheckpoint(f"{path / 'optimizer.safetensors'} has an unknown tensor's state: {unknown[0]}.")
    if isinstance(optimizer, torch.optim.AdamW):  # the state of other optimizers is not known here
        moments = {name: tensor for name, tensor in states.items() if tensor.dim()}
        keys = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 3 if optimizer.defaults["amsgrad"] else 2]
        expected = {f"{name}{_SEPARATOR}{key}": tuple(p.shape) for name, p in trained.items() for key in keys}
        check_tensors(path / "optimizer.safetensors", moments, expected)
    guard = dict(files["guard"])
    num_consecutive = guard.pop("num_consecutive", None)
    if num_consecutive is None or num_consecutive.shape != () or num_consecutive.dtype != torch.int64:
        raise CorruptCheckpoint(f"{path / 'guard.safetensors'} has no int64 scalar num_consecutive.")
    check_tensors(path / "guard.safetensors", guard, {"history": (3,)})
    for name in files:
        if name.startswith("rng-"):
            check_rng(files[name])


def group_settings(optimizer: torch.optim.Optimizer) -> list[dict[str, str]]:
    """Return the settings of each parameter group in a form that shows whether the optimizer has changed them.

    Tensors are not settings: an optimizer may change them in place, and they may be large.
    """
    return [
        {
            key: repr(list(value) if isinstance(value, tuple) else value)  # loading turns tuples into lists
            for key, value in group.items()
            if key not in _NOT_SAVED and not isinstance(value, Tensor)
        }
        for group in optimizer.param_groups
    ]


def plain_optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, initial: list[dict[str, str]]
) -> tuple[dict[str, Any], list[str]]:
    """Return the part of an optimizer's state that is plain numbers, such as step counts or an estimated step size.

    Of the groups' settings, only those that differ from `initial`, `group_settings` before the first step, are state.

    Returns:
        The numbers as JSON, and the keys of all state that is neither a number, a per-parameter tensor nor None.
    """
    parameters: dict[str, dict[str, int | float]] = {}
    groups: list[dict[str, int | float]] = []
    unsupported: set[str] = set()
    for name, parameter in model.named_parameters():
        values = optimizer.state.get(parameter, {})
        if numbers := {key: value for key, value in values.items() if isinstance(value, int | float)}:
            parameters[name] = numbers
        unsupported |= {k for k, value in values.items() if not isinstance(value, int | float | Tensor | None)}
    for group, before, now in zip(optimizer.param_groups, initial, group_settings(optimizer), strict=True):
        changed = {key: group[key] for key in now if now[key] != before.get(key)}
        groups.append({key: value for key, value in changed.items() if isinstance(value, int | float)})
        unsupported |= changed.keys() - groups[-1].keys()
        unsupported |= {key for key, value in group.items() if isinstance(value, Tensor) and key not in _NOT_SAVED}
    return {"parameters": parameters, "groups": groups}, sorted(unsupported)


def check_plain_optimizer_state(path: Path, state: object, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise CorruptCheckpoint unless a JSON value is a `plain_optimizer_state` of this model and optimizer."""
    names = {name for name, _ in model.named_parameters()}
    try:
        groups, parameters = state["groups"], state["parameters"]  # type: ignore[index]  # any JSON value
        values = [number for numbers in (*groups, *parameters.values()) for number in numbers.values()]
        valid = parameters.keys() <= names and len(groups) == len(optimizer.param_groups)
        valid = valid and not any(key in numbers for numbers in groups for key in _NOT_SAVED)
    except (AttributeError, KeyError, TypeError):
        valid, values = False, []
    if not (valid and all(isinstance(value, int | float) for value in values)):
        raise CorruptCheckpoint(f"{path} does not hold the state of this run's optimizer.")


def restore_plain_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Restore a state that `check_plain_optimizer_state` has accepted."""
    named = dict(model.named_parameters())
    for name, numbers in state["parameters"].items():
        optimizer.state[named[name]].update(numbers)
    for group, numbers in zip(optimizer.param_groups, state["groups"], strict=True):
        group.update(numbers)


def _weights_name(model: nn.Module) -> str:
    """Return the name of the weights' file; with LoRA, only the adapter is trained and saved."""
    return "adapter" if any(isinstance(module, LoRALinear) for module in model.modules()) else "model"


def _tensors(
    accelerator: Accelerator, wrapped: nn.Module, optimizer: torch.optim.Optimizer, *, full: bool
) -> TensorFiles:
    """Return weights and optimizer state: full on rank 0 and possibly empty elsewhere, or as they are sharded."""
    options = _options(accelerator, wrapped, full=full)
    weights: dict[str, Any] = get_model_state_dict(wrapped, options=options)
    weights.pop(LM_HEAD, None)  # tied to the embedding, which is stored
    states: dict[str, Any] = get_optimizer_state_dict(wrapped, optimizer, options=options)
    moments = {
        f"{parameter}{_SEPARATOR}{key}": value
        for parameter, values in states.get("state", {}).items()
        for key, value in values.items()
        if isinstance(value, Tensor)
    }
    return {_weights_name(wrapped): weights, "optimizer": moments}


def _scatter_weights(wrapped: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    named: dict[str, Any] = dict(tensors)
    if EMBEDDING in named:
        named[LM_HEAD] = named[EMBEDDING]
    set_model_state_dict(wrapped, named, options=_scatter_options(wrapped))


def _scatter_optimizer(
    accelerator: Accelerator, wrapped: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    if broadcast_bytes(accelerator, b"1" if tensors else b"0") == b"0":
        return  # the optimizer has no state, for example SGD without momentum
    # Only the groups of the current state are needed, so it is not gathered.
    options = _options(accelerator, wrapped, full=False)
    state_dict: dict[str, Any] = get_optimizer_state_dict(wrapped, optimizer, options=options)
    state: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        parameter, _, key = name.rpartition(_SEPARATOR)
        state.setdefault(parameter, {})[key] = tensor
    state_dict["state"] = state
    set_optimizer_state_dict(wrapped, optimizer, state_dict, options=_scatter_options(wrapped))


def _options(accelerator: Accelerator, model: nn.Module, *, full: bool) -> StateDictOptions:
    """Gather sharded tensors one by one onto the CPU; unsharded ones are copied once, by `_copy_to_cpu`."""
    adapter = _weights_name(model) == "adapter"
    return StateDictOptions(
        full_state_dict=full, cpu_offload=full and uses_fsdp(accelerator), ignore_frozen_params=adapter
    )


def _scatter_options(model: nn.Module) -> StateDictOptions:
    return StateDictOptions(
        full_state_dict=True,
        broadcast_from_rank0=torch.distributed.is_initialized(),
        strict=_weights_name(model) == "model",
    )


def _copy_to_cpu(files: TensorFiles) -> TensorFiles:
    """Replace each tensor by a copy on the CPU. From a GPU, all copies overlap, into pinned memory.

    Tensors are replaced one by one, so that gathered tensors and their copies do not exist at the same time.
    """
    for tensors in files.values():
        for name, tensor in tensors.items():
            tensors[name] = tensor.detach().to("cpu", copy=True, non_blocking=tensor.is_cuda)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    for tensors in files.values():
        for name, tensor in tensors.items():
            tensors[name] = tensor.contiguous()
    return files
