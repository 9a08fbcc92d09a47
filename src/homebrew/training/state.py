"""A run's weights and optimizer as plain named tensors.

The names are the bare model's whether it runs alone, on many processes, sharded or compiled; PyTorch's
`torch.distributed.checkpoint.state_dict` sees to that. All functions are collective: every process calls them.
"""

from collections.abc import Mapping
from typing import Any

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

from homebrew.training.collective import broadcast_bytes, gather_bytes
from homebrew.training.rng import restore_rng, rng_state

TIED = "lm_head.weight"
"""The head's weight is the embedding's: stored once, under `transformer.wte.weight`."""
EMBEDDING = "transformer.wte.weight"
_SEPARATOR = "//"


Files = dict[str, dict[str, Tensor]]
"""A checkpoint's tensor files, by name without suffix."""


def gather_run(accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer) -> Files:
    """All tensors a run goes on from: the weights, the optimizer's, and every process's random states.

    Args:
        accelerator: of the run.
        model: as `prepare` returned it.
        optimizer: not as `prepare` returned it.

    Returns:
        The files' tensors on the first process; on the others something not to be used.
    """
    states = gather_bytes(accelerator, save(rng_state()))
    files = {"model": gather_model(model), "optimizer": gather_optimizer(model, optimizer)}
    return files | {f"rng-{rank}": load(state) for rank, state in enumerate(states)}


def scatter_run(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    files: Files,
    *,
    seed: int,
) -> None:
    """Put `gather_run`'s tensors back.

    Args:
        accelerator: of the run.
        model: as `prepare` returned it.
        optimizer: not as `prepare` returned it.
        files: on the first process what a checkpoint holds; on the others not looked at.
        seed: for processes that the checkpoint has no random state of.
    """
    scatter_model(model, files.get("model", {}))
    scatter_optimizer(model, optimizer, files.get("optimizer", {}))
    for rank in range(accelerator.num_processes):
        state = broadcast_bytes(accelerator, save(files.get(f"rng-{rank}", {})))
        if rank == accelerator.process_index:
            if saved := load(state):
                restore_rng(saved)
            else:
                set_seed(seed, device_specific=True)


def gather_model(model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors on the CPU, copies that training will not change; empty on all but the first process."""
    tensors = get_model_state_dict(model, options=_gathered())
    tensors.pop(TIED, None)
    return _copied(tensors)


def scatter_model(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put `gather_model`'s tensors, read on the first process, into the model on every process."""
    named = dict(tensors)
    if EMBEDDING in named:
        named[TIED] = named[EMBEDDING]
    set_model_state_dict(model, named, options=_scattered())


def gather_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's tensors as `<parameter>//<state>`, on the CPU; empty on all but the first process."""
    state = get_optimizer_state_dict(model, optimizer, options=_gathered()).get("state", {})
    return _copied(
        {
            f"{parameter}{_SEPARATOR}{key}": value
            for parameter, values in state.items()
            for key, value in values.items()
            if isinstance(value, Tensor)
        }
    )


def scatter_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Put `gather_optimizer`'s tensors, read on the first process, into the optimizer on every process."""
    whole = get_optimizer_state_dict(model, optimizer, options=_gathered())
    state: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        parameter, key = name.split(_SEPARATOR)
        state.setdefault(parameter, {})[key] = tensor
    if whole:
        whole["state"] = state
    set_optimizer_state_dict(model, optimizer, whole, options=_scattered())


def _gathered() -> StateDictOptions:
    return StateDictOptions(full_state_dict=True, cpu_offload=True)


def _scattered() -> StateDictOptions:
    return StateDictOptions(full_state_dict=True, broadcast_from_rank0=torch.distributed.is_initialized())


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On a CPU the gathered tensors are the live ones, which the next step changes."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
