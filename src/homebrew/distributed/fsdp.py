"""FSDP2 through Accelerate: configure the plugin for a model, and gather full weights."""

import copy
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend, FullyShardedDataParallelPlugin
from torch import Tensor, nn

from homebrew.errors import LaunchError
from homebrew.model.interfaces import interface_of

GATHERED_SHARE = 1 / 16
"""Gathered weights that take at most this share of a GPU's memory are kept between the passes of a step."""


def uses_fsdp(accelerator: Accelerator) -> bool:
    """Return whether the run is sharded by FSDP2."""
    return bool(accelerator.is_fsdp2)


def configure_fsdp(accelerator: Accelerator, model: nn.Module) -> bool:
    """Make Accelerate's FSDP2 shard a model block by block and reduce gradients in float32; without FSDP, do nothing.

    Each block is an FSDP unit. In a GPT, the embeddings, the final norm and the head, which shares the embedding's
    weight, belong to the root unit. Small gathered weights are kept, even if the launch asks to free them: gathering
    them again in each pass takes time, and freeing them saves little memory.

    Returns:
        Whether the launch asks for activation checkpointing. Accelerate's checkpointing does not restore the random
        state, so recomputed dropout masks would differ. It is switched off; the caller should use the model's own.

    Raises:
        LaunchError: If the launch uses options that are not supported, or FSDP2 cannot shard the model.
    """
    plugin: FullyShardedDataParallelPlugin | None = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        return False
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    check_fsdp_options(accelerator, plugin)
    block_types = {type(block) for block in interface_of(model).blocks()}
    check_shardable(model, tuple(block_types), casts_weights=plugin.mixed_precision_policy is not None)
    plugin.auto_wrap_policy = transformer_auto_wrap_policy
    plugin.transformer_cls_names_to_wrap = sorted(block_type.__name__ for block_type in block_types)
    # This option would leave the model on the meta device and untie the head; every rank has the weights anyway.
    plugin.cpu_ram_efficient_loading = False
    if plugin.mixed_precision_policy is not None:
        # Accelerate's policy would reduce gradients, and return the loss, in the compute dtype.
        plugin.mixed_precision_policy = replace(
            plugin.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=None
        )
    if accelerator.num_processes == 1 or _fits_gathered(model, accelerator):  # one shard is the full weights anyway
        plugin.reshard_after_forward = False
    activation_checkpointing = bool(plugin.activation_checkpointing)
    plugin.activation_checkpointing = False
    return activation_checkpointing


def _fits_gathered(model: nn.Module, accelerator: Accelerator) -> bool:
    if accelerator.device.type != "cuda":
        return False
    policy = accelerator.state.fsdp_plugin.mixed_precision_policy
    dtype = None if policy is None else policy.param_dtype
    num_bytes = sum(p.numel() * (dtype or p.dtype).itemsize for p in model.parameters())
    _, total = torch.cuda.mem_get_info(accelerator.device)
    return num_bytes <= GATHERED_SHARE * total


def check_fsdp_options(accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin) -> None:
    """Raise LaunchError if the launch uses FSDP options that do not work with this model."""
    from torch.distributed.fsdp import CPUOffloadPolicy

    unsupported = []
    if plugin.fsdp_version != 2:
        unsupported.append(f"fsdp_version: {plugin.fsdp_version} (FSDP1; use 2)")
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        unsupported.append("fsdp_offload_params: true (use more processes, or activation checkpointing)")
    if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        unsupported.append("dynamo_backend (compiles around the shards; use TrainerConfig(compile=True))")
    parallelism = accelerator.parallelism_config
    if parallelism is not None and parallelism.non_data_parallel_size > 1:
        unsupported.append("tp_size, cp_size or sp_size above 1 (only data parallelism is supported)")
    if unsupported:
        raise LaunchError("The launcher's FSDP options are not supported. Change:\n  " + "\n  ".join(unsupported))


def check_shardable(model: nn.Module, block_types: tuple[type[nn.Module], ...], *, casts_weights: bool) -> None:
    """Raise LaunchError for a model that FSDP2 would reject only in the first step.

    FSDP2 does not support weights that are shared by two blocks, or by a block and the rest of the model. Nor does it
    support trainable weights of several dtypes, unless Accelerate casts them to float32.
    """
    units: dict[int, nn.Module] = {}

    def visit(module: nn.Module, unit: nn.Module, prefix: str) -> None:
        unit = module if isinstance(module, block_types) else unit
        for name, parameter in module.named_parameters(recurse=False):
            if units.setdefault(id(parameter), unit) is not unit:
                raise LaunchError(
                    f"FSDP2 cannot shard {type(model).__name__}: {prefix}{name} is shared by two blocks, or by a block "
                    f"and the rest of the model. Use DDP for this model."
                )
        for name, child in module.named_children():
            visit(child, unit, f"{prefix}{name}.")

    visit(model, model, "")
    dtypes = {str(parameter.dtype) for parameter in model.parameters() if parameter.requires_grad}
    if len(dtypes) > 1 and not casts_weights:
        raise LaunchError(
            f"FSDP2 cannot shard {type(model).__name__}, whose trainable weights are {' and '.join(sorted(dtypes))}. "
            f"Convert the model to one dtype, such as with model.float()."
        )


def prepare(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Prepare a model and its optimizer with Accelerate, and shard state that the optimizer already has.

    Under FSDP2, Accelerate replaces the parameters in the optimizer's groups, but not those in its state.

    Returns:
        The wrapped model, and Accelerate's wrapper of the optimizer.

    Raises:
        LaunchError: FSDP2 cannot shard the model, for example because it has a scalar parameter.
    """
    states: dict[str, dict[str, Any]] = {}
    if uses_fsdp(accelerator):
        if accelerator.num_processes > 1:  # start all ranks from rank 0's weights, as DDP does
            for tensor in (*model.parameters(), *model.buffers()):
                value = tensor.detach().contiguous()
                torch.distributed.broadcast(value, src=0)
                if not tensor.is_contiguous():
                    tensor.detach().copy_(value)
        states = {name: optimizer.state.pop(p) for name, p in model.named_parameters() if p in optimizer.state}
    try:
        wrapped, prepared = accelerator.prepare(model, optimizer)
    except (AssertionError, NotImplementedError, ValueError) as error:
        if not uses_fsdp(accelerator):
            raise
        reason = str(error).strip().partition("\n")[0].removesuffix(".")
        raise LaunchError(f"FSDP2 cannot shard {type(model).__name__}: {reason}. Use DDP for this model.") from error
    parameters = dict(model.named_parameters())
    for name, values in states.items():
        optimizer.state[parameters[name]] = {
            key: shard_like(value, parameters[name]) if isinstance(value, Tensor) else value
            for key, value in values.items()
        }
    return wrapped, prepared


def keeps_weights_gathered(accelerator: Accelerator) -> bool:
    """Return whether gathered weights are kept until the end of a step (`fsdp_reshard_after_forward: false`).

    FSDP alone would free them after each micro-batch's backward pass, although they change only once a step.
    """
    return uses_fsdp(accelerator) and not accelerator.state.fsdp_plugin.reshard_after_forward


def reshard(accelerator: Accelerator, wrapped: nn.Module) -> None:
    """Free the weights gathered by a forward pass without backward pass, so that the next pass gathers new ones."""
    if not uses_fsdp(accelerator):
        return
    from torch.distributed.fsdp import FSDPModule

    for module in wrapped.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a plain tensor with the full contents of a tensor that may be sharded; collective."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def local_shard(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a sharded tensor, or the tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def gather_like(shard: Tensor, parameter: Tensor) -> Tensor:
    """Gather a full tensor from shards that are laid out like a parameter's; collective.

    If the parameter is not sharded, the tensor is returned unchanged.
    """
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None:
        return shard
    from torch.distributed.tensor import DTensor

    placements: list[Any] = parameter.placements  # type: ignore[attr-defined]
    sharded = DTensor.from_local(shard, mesh, placements, shape=parameter.shape, stride=parameter.stride())
    return sharded.full_tensor()


def shard_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Shard a full tensor as a parameter is sharded; not collective, because every rank has the full tensor.

    A tensor of another shape than the parameter is replicated. Scalars and tensors of unsharded parameters are
    returned unchanged.
    """
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None or not tensor.dim():
        return tensor
    from torch.distributed.tensor import Replicate, distribute_tensor

    is_alike = tensor.shape == parameter.shape
    placements = parameter.placements if is_alike else [Replicate()] * mesh.ndim  # type: ignore[attr-defined]
    # A clone, because the shard would otherwise keep the full tensor in memory.
    return distribute_tensor(tensor.to(parameter.device), mesh, placements, src_data_rank=None).clone()


def meta_copy(model: nn.Module) -> nn.Module:
    """Return a copy of the model with its parameters on the meta device. Adapters and tied weights are kept."""
    parameters = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    return copy.deepcopy(model, parameters)


def gather_full_model(template: nn.Module, wrapped: nn.Module) -> nn.Module:
    """Return an unwrapped model in eval mode with the full weights of a wrapped or sharded model; collective.

    `template` is the result of `meta_copy` and is not changed.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    model = copy.deepcopy(template)
    tensors: dict[str, Any] = get_model_state_dict(wrapped, options=StateDictOptions(full_state_dict=True))
    model.load_state_dict(tensors, assign=True)
    first: dict[int, str] = {}
    for name, parameter in template.named_parameters(remove_duplicate=False):
        if (tied := first.setdefault(id(parameter), name)) != name:  # assigning has untied it
            path, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(path), attribute, model.get_parameter(tied))
    model.eval()
    return model
