"""How many sequences fit on the device at once: tried before a run, and explained if it fails in it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from accelerate.utils.memory import clear_device_cache

from homebrew.errors import TrainingError
from homebrew.model.gpt import GPT
from homebrew.training.trainer_config import BatchPlan, TrainerConfig, plan_batch

USUAL_MICRO_BATCH_TOKENS = {"cuda": 65_536}
"""Tokens a device takes at once where the user does not say."""
_USUAL_ELSEWHERE = 4_096


def plan_batch_for_device(
    accelerator: Accelerator, model: GPT, config: TrainerConfig, sequence_length: int
) -> BatchPlan:
    """A step's plan as the config asks for it.

    Args:
        accelerator: of the run.
        model: on its device, not yet compiled or wrapped.
        config: of the run.
        sequence_length: in tokens.

    Raises:
        ConfigError: the numbers do not divide.
        TrainingError: not even one sequence fits.
    """
    plan = plan_batch(
        global_batch_tokens=config.global_batch_tokens,
        micro_batch_size=config.micro_batch_size if isinstance(config.micro_batch_size, int) else None,
        block_size=sequence_length,
        num_processes=accelerator.num_processes,
        micro_batch_tokens=USUAL_MICRO_BATCH_TOKENS.get(accelerator.device.type, _USUAL_ELSEWHERE),
    )
    if config.micro_batch_size != "auto":
        return plan
    # A CPU has no limit to run into short of the machine's: there the usual is the most.
    most = plan.global_batch_size if accelerator.device.type != "cpu" else plan.micro_batch_size
    return fit_plan(accelerator, model, plan, sequence_length=sequence_length, most=most)


def fit_plan(accelerator: Accelerator, model: GPT, plan: BatchPlan, *, sequence_length: int, most: int) -> BatchPlan:
    """The same global batch in the largest micro-batches that fit on every process.

    The trial is of the bare model, so that no process waits for another that has run out. A compiled step needs less
    than this one, and so does a sharded one.

    Args:
        accelerator: of the run.
        model: on its device, not yet compiled or wrapped.
        plan: a global batch that divides by the number of processes.
        sequence_length: in tokens.
        most: sequences; larger micro-batches are not tried.

    Raises:
        TrainingError: not even one sequence fits.
    """
    share = plan.global_batch_size // accelerator.num_processes
    sizes = [size for size in range(1, share + 1) if share % size == 0 and size <= max(1, most)]

    def fits(size: int) -> bool:
        mine = _fits(accelerator, model, size, sequence_length)
        everyone = accelerator.reduce(torch.tensor(float(mine), device=accelerator.device), "sum")
        return bool(everyone.item() == accelerator.num_processes)

    size = largest(sizes, fits)
    if size is None:
        raise TrainingError(
            f"Not even one sequence of {sequence_length} tokens fits on every process beside the weights, gradients "
            f"and optimizer. {_SAVERS}"
        )
    return BatchPlan(plan.global_batch_size, size, share // size)


def largest(sizes: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """The largest size that fits, by bisection; None if none does.

    Args:
        sizes: in ascending order.
        fits: if a size does, so does every smaller one.
    """
    low, high = 0, len(sizes)  # all below `low` fit, none from `high` on
    while low < high:
        middle = (low + high) // 2
        if fits(sizes[middle]):
            low = middle + 1
        else:
            high = middle
    return sizes[low - 1] if low else None


@contextmanager
def explain_out_of_memory(accelerator: Accelerator, plan: BatchPlan) -> Iterator[None]:
    """Say what to lower where a step runs out of memory within the context.

    Raises:
        TrainingError: it did.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        smaller = next((n for n in range(plan.micro_batch_size - 1, 0, -1) if plan.micro_batch_size % n == 0), None)
        advice = _SAVERS
        if smaller is not None:
            advice = f"Lower micro_batch_size: {smaller} or 'auto' leaves the global batch as it is. Or else: {_SAVERS}"
        raise TrainingError(
            f"Process {accelerator.process_index} ran out of memory on {accelerator.device} with "
            f"micro_batch_size={plan.micro_batch_size}. {advice}"
        ) from error


_SAVERS = "Set activation_checkpointing=True, shard the model with FSDP2 over more GPUs, or train a smaller one."


def _fits(accelerator: Accelerator, model: GPT, size: int, sequence_length: int) -> bool:
    """Whether this process can go through a trial; what it took is free again, and not in the peak that is reported."""
    device = accelerator.device
    was_training = model.training
    model.train()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            _try(accelerator, model, size, sequence_length)  # whose tensors are gone with it, also when it fails
    except torch.OutOfMemoryError:
        return False
    else:
        return True
    finally:
        model.train(was_training)
        model.zero_grad(set_to_none=True)
        clear_device_cache(garbage_collection=True)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)


def _try(accelerator: Accelerator, model: GPT, size: int, sequence_length: int) -> None:
    """Go through two micro-batches, the first's gradients and the optimizer in memory."""
    _reserved = _reserve(accelerator, model)
    ids = torch.zeros(size, sequence_length, dtype=torch.int64, device=accelerator.device)
    for _ in range(2):
        with accelerator.autocast():
            loss = model(ids, ids)
        loss.backward()


def _reserve(accelerator: Accelerator, model: GPT) -> list[torch.Tensor]:
    """As much memory as AdamW's two moments will take, and DDP's copy of the gradients."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if accelerator.distributed_type == DistributedType.FSDP:
        return [p.new_empty(2 * p.numel() // accelerator.num_processes) for p in trained]
    return [p.new_empty((2 if accelerator.num_processes == 1 else 3) * p.numel()) for p in trained]
