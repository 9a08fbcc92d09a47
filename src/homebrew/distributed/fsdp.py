"""FSDP2 through Accelerate: what a launch file leaves open, or Accelerate gets wrong for this model, set right."""

import copy
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend, FullyShardedDataParallelPlugin
from torch import Tensor, nn

from homebrew.errors import LaunchError
from homebrew.model.gpt import GPT
from homebrew.model.transformer import Block


def uses_fsdp(accelerator: Accelerator) -> bool:
    """Whether the run is FSDP's."""
    return bool(accelerator.is_fsdp2)


def configure_fsdp(accelerator: Accelerator) -> bool:
    """Make Accelerate's FSDP2 shard a GPT by its blocks, and sum gradients in float32; without FSDP do nothing.

    Each block is a unit; the embeddings, the last norm and the head, whose weight is the embedding's, are the root's.

    Returns:
        Whether the launch asks for activation checkpointing. Accelerate's own does not keep the random states, so
        that dropout would differ between a pass and its repetition: it is switched off, and ours is to be used.

    Raises:
        LaunchError: the launch asks for what would be wrong or is not there; the message lists all of it.
    """
    plugin: FullyShardedDataParallelPlugin | None = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        return False
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    check_fsdp_options(accelerator, plugin)
    plugin.auto_wrap_policy = transformer_auto_wrap_policy
    plugin.transformer_cls_names_to_wrap = [Block.__name__]
    # It would leave the model on the meta device and break the head's tie; every process has the weights anyway.
    plugin.cpu_ram_efficient_loading = False
    if plugin.mixed_precision_policy is not None:
        # Accelerate's would sum gradients, and return the loss, in the dtype of the matrix products.
        plugin.mixed_precision_policy = replace(
            plugin.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=None
        )
    if accelerator.num_processes == 1:
        plugin.reshard_after_forward = False  # nobody to share with
    wanted = bool(plugin.activation_checkpointing)
    plugin.activation_checkpointing = False
    return wanted


def keeps_weights_gathered(accelerator: Accelerator) -> bool:
    """Whether processes keep the whole weights for a step, once gathered; `fsdp_reshard_after_forward: false` asks.

    FSDP by itself would give them up after every micro-batch's backward pass, though none of them changes a weight.
    """
    return uses_fsdp(accelerator) and not accelerator.state.fsdp_plugin.reshard_after_forward


def reshard(accelerator: Accelerator, wrapped: nn.Module) -> None:
    """Give up what FSDP gathered, where no backward pass will: the next pass is to see what became of the shards."""
    if not uses_fsdp(accelerator):
        return
    from torch.distributed.fsdp import FSDPModule

    for module in wrapped.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def check_fsdp_options(accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin) -> None:
    """Refuse what this model cannot be sharded by.

    Raises:
        LaunchError: see `configure_fsdp`.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy

    wrong = []
    if plugin.fsdp_version != 2:
        wrong.append(f"fsdp_version: {plugin.fsdp_version} (FSDP1 is not supported; use 2)")
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        wrong.append("fsdp_offload_params: true (not supported; use more processes, or activation checkpointing)")
    if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        wrong.append("dynamo_backend (it compiles around the shards; use TrainerConfig(compile=True) instead)")
    parallelism = accelerator.parallelism_config
    if parallelism is not None and parallelism.non_data_parallel_size > 1:
        wrong.append("tp_size, cp_size or sp_size above 1 (a model is shared out by data only)")
    if wrong:
        raise LaunchError("FSDP cannot run with:\n  " + "\n  ".join(wrong))


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor that may be shared out over the processes, as a plain one; collective."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def meta_copy(model: GPT) -> GPT:
    """A model of the same modules and ties, adapters included, whose weights take no memory."""
    empty = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    return copy.deepcopy(model, empty)


def gather_full_model(empty: GPT, wrapped: nn.Module) -> GPT:
    """A plain model with the whole weights of a wrapped or sharded one; collective.

    Args:
        empty: of `meta_copy`; it is left as it is.
        wrapped: as `prepare` returned it.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    model = copy.deepcopy(empty)
    tensors: dict[str, Any] = get_model_state_dict(wrapped, options=StateDictOptions(full_state_dict=True))
    model.load_state_dict(tensors, assign=True)
    model.lm_head.weight = model.transformer.wte.weight
    return model.eval()
