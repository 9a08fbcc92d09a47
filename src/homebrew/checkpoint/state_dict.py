"""A run's weights and optimizer as plain named tensors.

The names are the bare model's whether it runs alone, on many processes, sharded or compiled; PyTorch's
`torch.distributed.checkpoint.state_dict` sees to that. All functions are collective: every process calls them.
"""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from homebrew.checkpoint.pieces import check_placements, cut, my_shard, own_rows, piece_name
from homebrew.checkpoint.rng_state import check_rng, restore_rng, rng_state
from homebrew.checkpoint.tensor_check import check_tensors
from homebrew.distributed.collectives import broadcast_bytes, gather_bytes
from homebrew.errors import CorruptCheckpoint
from homebrew.model.gpt_config import EMBEDDING, LM_HEAD
from homebrew.model.lora import LoRALinear

_SEPARATOR = "//"


class Stateful(Protocol):
    """An object whose state is a flat dictionary of tensors."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state."""

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Restore the state."""


Files = dict[str, dict[str, Tensor]]
"""A checkpoint's tensor files, by name without suffix."""


def run_bytes(model: nn.Module) -> int:
    """What a run's checkpoint takes: the weights, and Adam's two moments of those that train.

    Args:
        model: as `prepare` returned it, or the bare one.
    """
    kept = 0 if _weights_file(model) == "adapter" else 1
    return sum(p.numel() * p.element_size() * (3 if p.requires_grad else kept) for p in model.parameters())


def gather_run(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    guard: Stateful,
    *,
    in_pieces: bool = False,
) -> Files:
    """All tensors a run goes on from: the weights that train, the optimizer's, and every process's random states.

    Args:
        accelerator: of the run.
        model: as `prepare` returned it.
        optimizer: not as `prepare` returned it.
        guard: of the run's updates.
        in_pieces: leave weights and optimizer where they are sharded.

    Returns:
        The files' tensors, on the CPU, copies that training will not change: all of them on the first process and
        none on the others, or on each its own piece of weights and optimizer, of which there may be none.

    Raises:
        CheckpointError: on every process, a tensor cannot be left where it is.
    """
    states = gather_bytes(accelerator, save(rng_state()))
    options = _options(accelerator, model, gathered=not in_pieces)
    weights: dict[str, Any] = get_model_state_dict(model, options=options)
    weights.pop(LM_HEAD, None)  # stored once, as the token embedding
    files = {_weights_file(model): weights, "optimizer": _optimizer_tensors(model, optimizer, options)}
    if in_pieces:
        for tensors in files.values():  # on every process, also those that write no shard
            check_placements(tensors)
        shard = my_shard(model)
        files = {piece_name(name, *shard): cut(files[name], shard[0]) for name in files} if shard else {}
    elif not accelerator.is_main_process:
        files = {}
    if not accelerator.is_main_process:
        return _copied(files)
    files["guard"] = guard.state_dict()
    return _copied(files) | {f"rng-{rank}": load(state) for rank, state in enumerate(states)}


def scatter_run(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    guard: Stateful,
    files: Files,
    *,
    seed: int,
) -> None:
    """Put `gather_run`'s tensors back.

    Args:
        accelerator: of the run.
        model: as `prepare` returned it.
        optimizer: not as `prepare` returned it.
        guard: of the run's updates.
        files: on the first process what a checkpoint holds, checked by `check_files`; on the others not looked at.
        seed: for processes that the checkpoint has no random state of.
    """
    _scatter_weights(model, files.get(_weights_file(model), {}))
    _scatter_optimizer(accelerator, model, optimizer, files.get("optimizer", {}))
    guard.load_state_dict(load(broadcast_bytes(accelerator, save(files.get("guard", {})))))
    for rank in range(accelerator.num_processes):
        state = broadcast_bytes(accelerator, save(files.get(f"rng-{rank}", {})))
        if rank == accelerator.process_index:
            if saved := load(state):
                restore_rng(saved)
            else:
                set_seed(seed, device_specific=True)


def reserve_staging(accelerator: Accelerator, model: nn.Module, *, in_pieces: bool = False) -> None:
    """Have pinned memory ready for `gather_run`'s copies: page-locking it takes longer than a step.

    PyTorch keeps pinned memory once it has been freed. Adam's moments are what is reckoned with. What is sharded and
    gathered comes through memory of PyTorch's own.

    Args:
        accelerator: of the run.
        model: as `prepare` returned it; on a GPU, else there is nothing to do.
        in_pieces: as `gather_run` will be told.
    """
    alone = accelerator.is_main_process and accelerator.distributed_type != DistributedType.FSDP
    if accelerator.device.type == "cuda" and (in_pieces or alone):
        trained = [own_rows(p) if in_pieces else p for p in model.parameters() if p.requires_grad]
        with contextlib.suppress(RuntimeError):  # no more can be locked: copies will be slower
            _ = [torch.empty(p.shape, dtype=p.dtype, pin_memory=True) for p in trained for _ in range(3)]


def check_files(path: Path, files: Files, bare: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Compare a checkpoint's tensors with what the run needs, before any is put anywhere.

    Args:
        path: of the checkpoint, for messages.
        files: what it holds.
        bare: the model without wrappers, whose names a checkpoint's are.
        optimizer: not as `prepare` returned it.

    Raises:
        CorruptCheckpoint: a file or a tensor is missing, unknown, or of another shape or dtype.
    """
    kind = _weights_file(bare)
    trained = {name: parameter for name, parameter in bare.named_parameters() if parameter.requires_grad}
    for name in (kind, "optimizer", "guard", "rng-0"):
        if name not in files:
            raise CorruptCheckpoint(f"{path} has no {name}.safetensors, which this run needs.")
    saved = trained if kind == "adapter" else dict(bare.named_parameters())
    check_tensors(path / f"{kind}.safetensors", files[kind], {name: tuple(p.shape) for name, p in saved.items()})
    states = files["optimizer"]
    if unknown := sorted({name.rpartition(_SEPARATOR)[0] for name in states} - trained.keys()):
        raise CorruptCheckpoint(f"{path / 'optimizer.safetensors'} has an unknown tensor's state: {unknown[0]}.")
    if isinstance(optimizer, torch.optim.AdamW):  # what another keeps, it alone knows
        moments = {name: tensor for name, tensor in states.items() if tensor.dim()}
        keys = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 3 if optimizer.defaults["amsgrad"] else 2]
        needed = {f"{name}{_SEPARATOR}{key}": tuple(p.shape) for name, p in trained.items() for key in keys}
        check_tensors(path / "optimizer.safetensors", moments, needed)
    floats = {name: tensor for name, tensor in files["guard"].items() if name != "num_consecutive"}
    check_tensors(path / "guard.safetensors", floats, {"history": (3,)})
    num_consecutive = files["guard"].get("num_consecutive")
    if num_consecutive is None or num_consecutive.shape != () or num_consecutive.is_floating_point():
        raise CorruptCheckpoint(f"{path / 'guard.safetensors'} has no integer num_consecutive.")
    for name in files:
        if name.startswith("rng-"):
            check_rng(files[name])


def _weights_file(model: nn.Module) -> str:
    """Under LoRA the base does not change: the adapter is all there is to keep."""
    return "adapter" if any(isinstance(module, LoRALinear) for module in model.modules()) else "model"


def _scatter_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    named: dict[str, Any] = dict(tensors)
    if EMBEDDING in named:
        named[LM_HEAD] = named[EMBEDDING]
    set_model_state_dict(model, named, options=_scattered(model))


def _optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, options: StateDictOptions
) -> dict[str, Tensor]:
    """The optimizer's tensors as `<parameter>//<state>`."""
    whole: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=options)
    return {
        f"{parameter}{_SEPARATOR}{key}": value
        for parameter, values in whole.get("state", {}).items()
        for key, value in values.items()
        if isinstance(value, Tensor)
    }


def _scatter_optimizer(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    if broadcast_bytes(accelerator, b"1" if tensors else b"0") == b"0":
        return  # plain SGD has nothing to remember
    # Of the state that is there only the groups are of use: it is not gathered.
    options = _options(accelerator, model, gathered=False)
    whole: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=options)
    state: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        parameter, _, key = name.rpartition(_SEPARATOR)
        state.setdefault(parameter, {})[key] = tensor
    whole["state"] = state
    set_optimizer_state_dict(model, optimizer, whole, options=_scattered(model))


def _options(accelerator: Accelerator, model: nn.Module, *, gathered: bool) -> StateDictOptions:
    """Sharded tensors are gathered one by one onto the CPU; whole ones are only named here, and copied once."""
    sharded = accelerator.distributed_type == DistributedType.FSDP
    adapted = _weights_file(model) == "adapter"
    return StateDictOptions(full_state_dict=gathered, cpu_offload=gathered and sharded, ignore_frozen_params=adapted)


def _scattered(model: nn.Module) -> StateDictOptions:
    return StateDictOptions(
        full_state_dict=True,
        broadcast_from_rank0=torch.distributed.is_initialized(),
        strict=_weights_file(model) == "model",
    )


def _copied(files: Files) -> Files:
    """The files with copies on the CPU: from a GPU all are under way at once, into pinned memory, before one wait.

    A copy takes its tensor's place, so that of what was gathered there are not two at a time.
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
