"""Compiles the model with torch.compile."""

import math
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend
from torch import nn

from homebrew.data.loader import Batch
from homebrew.distributed.fsdp import uses_fsdp
from homebrew.model.gpt import GPT
from homebrew.model.interfaces import interface_of
from homebrew.model.language_model import LossFunction
from homebrew.model.lora import lora_layers
from homebrew.model.passes import trial
from homebrew.training.batch_size import BatchPlan
from homebrew.training.global_settings import configure_compiler, separate_compile_cache

LAUNCH_BOUND_FLOPS = 1.5e13
"""Micro-batches of fewer FLOPs are compiled into CUDA graphs. An H200 runs this many in 30 ms, which is about
the time that Python needs to launch the kernels of GPT-2 small."""

SHORT_RUN_FLOPS = 5e15
"""Runs of fewer FLOPs whose micro-batches are launch-bound are captured without compiling, which would take longer than
it saves: for nanoGPT's `shakespeare_char` some 13 s, or the time it saves in 4,500 steps."""

EAGER_EVALUATION_FLOPS = 4e12
"""Models whose training micro-batch has fewer FLOPs are evaluated uncompiled: a pass takes milliseconds, and compiling
it took 6.5 s."""

COMPILED_BY_BLOCK_FLOPS = 3e17
"""Runs of a GPT of fewer FLOPs that are not launch-bound are compiled block by block. All blocks share the code of the
first, so GPT-2 small takes its first step 15 s earlier on an H200; but kernels are not fused across blocks, and its
throughput is 2.3 % lower. An H200 runs this many FLOPs in about 9 minutes. Another model's head and loss would run
uncompiled, with the logits of all tokens in memory."""

CompileMode = Literal["none", "kernels", "cuda_graphs", "captured"]
"""How the model runs: eagerly; compiled; compiled, with forward and backward passes replayed as CUDA graphs; or not
compiled, but with forward and backward pass replayed as one CUDA graph."""


def compile_model(
    model: nn.Module,
    wanted: bool | Literal["auto"],
    accelerator: Accelerator,
    batch: BatchPlan,
    *,
    micro_batch_flops: float,
    max_steps: int,
) -> CompileMode:
    """Compile a model in place, so that the names in its state dict do not change, if that pays.

    Compilation happens at the first call.

    Args:
        model: Model on its device.
        wanted: Whether to compile; "auto" compiles on CUDA only, and as much as pays in a run of this length.
        accelerator: The run's Accelerator. If its launcher chose a Dynamo backend, compilation is left to Accelerate.
        batch: How a step is divided into micro-batches.
        micro_batch_flops: FLOPs of one micro-batch, forward and backward.
        max_steps: Steps of the run.

    Returns:
        How the model is compiled.
    """
    on_cuda = accelerator.device.type == "cuda"
    if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        separate_compile_cache()
        return "none"
    if not (on_cuda if wanted == "auto" else wanted):
        return "none"
    interface = interface_of(model)
    use_graphs = (
        on_cuda
        and interface.supports_cuda_graphs
        and micro_batch_flops < LAUNCH_BOUND_FLOPS
        and accelerator.distributed_type == DistributedType.NO
        and (batch.accumulation_steps == 1 or _gradients_fit_twice(model))
    )
    run_flops = max_steps * batch.accumulation_steps * micro_batch_flops if wanted == "auto" else math.inf
    if use_graphs and run_flops < SHORT_RUN_FLOPS and _can_capture(model):
        return "captured"
    configure_compiler()
    by_block = uses_fsdp(accelerator) or (  # FSDP gathers weights between blocks
        isinstance(model, GPT) and not use_graphs and run_flops < COMPILED_BY_BLOCK_FLOPS
    )
    options = {"triton.cudagraphs": True} if use_graphs else {}
    if use_graphs and model.config.dropout:  # type: ignore[union-attr]  # only a GPT supports graphs
        # Inductor's kernel for the sums of a layer norm along both axes is slow if it also contains a dropout.
        options["triton.mix_order_reduction"] = False
    for module in interface.blocks() if by_block else [model]:
        # Static shapes: PyTorch would switch to dynamic ones for a second Trainer with another batch size.
        module.compile(options=options, dynamic=False)
    return "cuda_graphs" if use_graphs else "kernels"


def warm_up_compiled(
    accelerator: Accelerator,
    model: nn.Module,
    batch: Batch,
    *,
    loss_function: LossFunction,
) -> None:
    """Compile before the first step, with passes that change neither weights, buffers, gradients nor random states.

    The first evaluation compiles its own passes. Under FSDP nothing is done: its passes are collective, and compile
    with the first step.
    """
    if uses_fsdp(accelerator):
        return
    input_ids, targets = batch
    if accelerator.device.type == "cuda":  # each thread has its own cuBLAS handle, which a capture cannot create
        torch.ones(1, 1, device=accelerator.device).mm(torch.ones(1, 1, device=accelerator.device))
    try:
        with trial(model), accelerator.no_sync(model):
            model.train()
            loss_function(model, input_ids, targets).backward()  # type: ignore[no-untyped-call]
    finally:
        model.zero_grad(set_to_none=True)


def _can_capture(model: nn.Module) -> bool:
    """Return whether the passes of a GPT can be captured without a compiler, which would split them where necessary.

    Custom modules may do on the host what a replay leaves out, compiled ones may replay CUDA graphs themselves, and
    recomputing activations looks at the random state.
    """
    return not (
        any(not type(module).__module__.startswith(("homebrew.", "torch.nn.")) for module in model.modules())
        or any(module._compiled_call_impl is not None for module in model.modules())
        or lora_layers(model)
        or any(block.activation_checkpointing for block in interface_of(model).blocks())
    )


def _gradients_fit_twice(model: nn.Module) -> bool:
    """Return whether the GPU has memory for a second copy of the gradients, outside the CUDA graph."""
    _, total = torch.cuda.mem_get_info(next(model.parameters()).device)
    return 16 * sum(p.nbytes for p in model.parameters() if p.requires_grad) <= total
