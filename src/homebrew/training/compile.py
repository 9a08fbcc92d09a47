"""Whether and how a model is compiled, and what is done about a damaged cache of what was compiled before."""

import atexit
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend
from torch import nn

from homebrew.data.loader import Batch
from homebrew.errors import HomebrewError
from homebrew.model.gpt import GPT
from homebrew.training.trainer_config import BatchPlan

LAUNCH_BOUND_FLOPS = 1.5e13
"""A smaller micro-batch is compiled into CUDA graphs: an H200 does this one in 30 ms, and Python launches GPT-2
small's kernels hardly faster."""

EAGER_EVALUATION_FLOPS = 4e12
"""A model whose micro-batch, in training, is smaller still is evaluated uncompiled: a pass takes some milliseconds, and
compiling it took 6.5 s."""

RECOMPILE_LIMIT = 64
"""Cases of one function that are compiled; PyTorch's own limit is eight, beyond which it runs uncompiled. All models
of a process are cases of one, each twice, in training and in evaluation: four shapes in a notebook use eight up."""

Compiled = Literal["no", "yes", "as graphs"]
"""Whether a model is compiled, and its step CUDA graphs, which a GPU runs without waiting for Python."""


def compile_model(
    model: GPT,
    wanted: bool | Literal["auto"],
    accelerator: Accelerator,
    batch: BatchPlan,
    *,
    micro_batch_flops: float,
) -> Compiled:
    """Compile a model in place, so that no wrapper prefixes the names in its state dict.

    Args:
        model: on its device.
        wanted: "auto" is on CUDA only.
        accelerator: of the run; where its launcher asked for a compiler, that one is left to it.
        batch: of a step.
        micro_batch_flops: forward and backward of one micro-batch.

    Returns:
        What it will be, when it is first called.
    """
    on_cuda = accelerator.device.type == "cuda"
    if not (on_cuda if wanted == "auto" else wanted) or accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        return "no"
    from torch._dynamo import config as compiler  # which takes a second, and a run that is not compiled goes without

    compiler.recompile_limit = max(compiler.recompile_limit, RECOMPILE_LIMIT)
    if accelerator.is_fsdp2:
        for block in model.transformer.h:  # between them weights are gathered
            block.compile()
        return "yes"
    as_graphs = (
        on_cuda
        and micro_batch_flops < LAUNCH_BOUND_FLOPS
        and accelerator.distributed_type == DistributedType.NO
        and (batch.accumulation_steps == 1 or _gradients_are_small(model))
    )
    options = {"triton.cudagraphs": True} if as_graphs else {}
    if as_graphs and model.config.dropout:
        # One kernel for the sums of a layer norm along both axes is a slow one where it also has a dropout to do.
        options["triton.mix_order_reduction"] = False
    # Not for sizes that vary, as PyTorch would for a second Trainer in the process whose batches have another size.
    model.compile(options=options, dynamic=False)
    return "as graphs" if as_graphs else "yes"


def _gradients_are_small(model: GPT) -> bool:
    """Whether the GPU's memory has room for them twice: their sums lie outside of the graph that makes them."""
    _, total = torch.cuda.mem_get_info(model.device)
    return 16 * sum(p.nbytes for p in model.parameters() if p.requires_grad) <= total


def warm_up_compiled(accelerator: Accelerator, model: nn.Module, batch: Batch, *, evaluates: bool) -> None:
    """Compile now, by a pass that leaves no trace; and again, without what earlier runs left, where that fails.

    PyTorch and Triton keep what they compile, and read it unchecked: of a file that a power failure cut short they
    make any error, in the forward or the backward pass. Here no process waits for another yet, so that one alone can
    start over. The shards of FSDP do wait; under it nothing is done.

    Args:
        accelerator: of the run.
        model: as `prepare` returned it.
        batch: of the run's shape.
        evaluates: whether the model will also be called for evaluation, which is compiled apart.
    """
    if accelerator.is_fsdp2:
        return
    try:
        _pass(accelerator, model, batch, evaluates=evaluates)
    except (HomebrewError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        from torch._inductor.runtime.cache_dir_utils import cache_dir
        from torch._inductor.utils import fresh_cache

        warnings.warn(
            f"The compiled model failed, and is compiled again without what earlier runs left in {cache_dir()}: if "
            f"this run goes on, delete that folder, for it is damaged. The failure was {error!r:.500}",
            stacklevel=3,
        )
        torch.compiler.reset()
        cache = ExitStack()
        atexit.register(cache.close)  # not before: what this process compiles later would read the damaged one
        cache.enter_context(fresh_cache())
        _pass(accelerator, model, batch, evaluates=evaluates)


def _pass(accelerator: Accelerator, model: nn.Module, batch: Batch, *, evaluates: bool) -> None:
    device, (input_ids, targets) = accelerator.device, batch
    try:
        with _rng_forked(device), accelerator.no_sync(model):
            model(input_ids, targets).backward()
            if evaluates:
                with torch.no_grad():
                    model.eval()(input_ids, targets)
    finally:
        model.train()
        model.zero_grad(set_to_none=True)


@contextmanager
def _rng_forked(device: torch.device) -> Iterator[None]:
    """Afterwards PyTorch's generators are where they were; MPS has one, which `fork_rng` does not know."""
    mps = torch.mps.get_rng_state() if device.type == "mps" else None
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        if mps is not None:
            torch.mps.set_rng_state(mps)
