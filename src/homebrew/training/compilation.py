"""Whether and how a model is compiled."""

from typing import Literal

from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend

from homebrew.model.gpt import GPT
from homebrew.training.config import BatchPlan

LAUNCH_BOUND_FLOPS = 4e12
"""A GPU does a smaller micro-batch faster than Python can launch its kernels: about 10 ms of work."""


def compile_model(
    model: GPT,
    wanted: bool | Literal["auto"],
    accelerator: Accelerator,
    batch: BatchPlan,
    *,
    micro_batch_flops: float,
) -> None:
    """Compile a model in place, so that no wrapper prefixes the names in its state dict.

    Args:
        model: on its device.
        wanted: "auto" is on CUDA only.
        accelerator: of the run; where its launcher asked for a compiler, that one is left to it.
        batch: of a step.
        micro_batch_flops: forward and backward of one micro-batch.
    """
    on_cuda = accelerator.device.type == "cuda"
    if not (on_cuda if wanted == "auto" else wanted) or accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        return
    if accelerator.is_fsdp2:
        for block in model.transformer.h:  # between them weights are gathered
            block.compile()
        return
    # A graph's replay reuses the memory of the one before, in which accumulated gradients would still lie.
    as_graph = (
        on_cuda
        and micro_batch_flops < LAUNCH_BOUND_FLOPS
        and batch.accumulation_steps == 1
        and accelerator.distributed_type == DistributedType.NO
    )
    model.compile(mode="reduce-overhead" if as_graph else None)
