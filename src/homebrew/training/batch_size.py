"""Computes the micro-batch size and the number of accumulation steps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache
from torch import nn

from homebrew.distributed.fsdp import uses_fsdp
from homebrew.errors import ConfigError, TrainingError
from homebrew.model.interfaces import interface_of
from homebrew.model.language_model import LossFunction
from homebrew.model.passes import trial
from homebrew.training.trainer_config import TrainerConfig

_TOKENS_WITHOUT_CUDA = 4_096
"""Tokens of a micro-batch on other devices than CUDA GPUs, if the user does not set a micro-batch size."""

MEMORY_ADVICE = "Set activation_checkpointing=True, shard the model with FSDP2 over more GPUs, or use a smaller model."


@dataclass(frozen=True)
class BatchPlan:
    """How a step is divided: `global_batch_size` = ranks × accumulation steps × micro-batch size, in sequences."""

    global_batch_size: int
    micro_batch_size: int
    accumulation_steps: int


def plan_batch(
    *,
    global_batch_tokens: int | None,
    micro_batch_size: int | None,
    block_size: int,
    num_processes: int,
    micro_batch_tokens: int,
) -> BatchPlan:
    """Divide the global batch into micro-batches.

    Args:
        global_batch_tokens: Tokens in a step; one micro-batch per rank if None.
        micro_batch_size: Sequences in a micro-batch; if None, the largest divisor of a rank's share of the step that
            stays within `micro_batch_tokens`.
        block_size: Tokens in a sequence.
        num_processes: Number of ranks that share the step.
        micro_batch_tokens: Default number of tokens in a micro-batch.

    Raises:
        ConfigError: `global_batch_tokens` is not divisible as required; the message gives the nearest valid values.
    """
    if global_batch_tokens is None:
        size = micro_batch_size or max(1, micro_batch_tokens // block_size)
        return BatchPlan(size * num_processes, size, 1)
    unit = block_size * num_processes * (micro_batch_size or 1)
    if global_batch_tokens % unit:
        below, above = global_batch_tokens // unit * unit, (global_batch_tokens // unit + 1) * unit
        nearest = (
            f"The nearest valid values are {below} and {above}" if below else f"The smallest valid value is {above}"
        )
        raise ConfigError(
            f"global_batch_tokens={global_batch_tokens} does not divide into micro-batches of "
            f"{micro_batch_size or 1} × {block_size} tokens, the length of a sample, on {num_processes} "
            f"process{'es' * (num_processes > 1)}. {nearest}."
        )
    share = global_batch_tokens // (block_size * num_processes)
    if micro_batch_size is None:
        most = max(1, min(share, micro_batch_tokens // block_size))
        micro_batch_size = next(size for size in range(most, 0, -1) if share % size == 0)
    return BatchPlan(share * num_processes, micro_batch_size, share // micro_batch_size)


def plan_batch_for_device(
    accelerator: Accelerator,
    model: nn.Module,
    config: TrainerConfig,
    sequence_length: int,
    loss_function: LossFunction,
) -> BatchPlan:
    """Plan the batch of a config. For `micro_batch_size="auto"`, find the largest micro-batch that fits in memory.

    Raises:
        ConfigError: `global_batch_tokens` is not divisible as required.
        TrainingError: Not even one sequence fits.
    """
    on_cuda = accelerator.device.type == "cuda"
    plan = plan_batch(
        global_batch_tokens=config.global_batch_tokens,
        micro_batch_size=config.micro_batch_size if isinstance(config.micro_batch_size, int) else None,
        block_size=sequence_length,
        num_processes=accelerator.num_processes,
        micro_batch_tokens=interface_of(model).micro_batch_tokens if on_cuda else _TOKENS_WITHOUT_CUDA,
    )
    if config.micro_batch_size != "auto":
        return plan
    # Running out of memory on a CPU ends the process instead of raising an error, so larger sizes are not tried.
    most = plan.global_batch_size if accelerator.device.type != "cpu" else plan.micro_batch_size
    return fit_micro_batch_size(
        accelerator,
        model,
        plan,
        sequence_length=sequence_length,
        most=most,
        averages_weights=config.ema_decay is not None,
        loss_function=loss_function,
    )


def fit_micro_batch_size(
    accelerator: Accelerator,
    model: nn.Module,
    plan: BatchPlan,
    *,
    sequence_length: int,
    most: int,
    averages_weights: bool,
    loss_function: LossFunction,
) -> BatchPlan:
    """Divide the same global batch into the largest micro-batches that fit on every rank.

    Trials use the bare model, so that no rank waits for another that has run out of memory. A compiled or sharded step
    needs less memory than a trial.

    Args:
        accelerator: The run's accelerator.
        model: Model without wrappers.
        plan: How to divide the step without a trial.
        sequence_length: Tokens in a sequence.
        most: Largest micro-batch to try, in sequences.
        averages_weights: Whether the run averages its weights.
        loss_function: Computes the loss of a micro-batch.

    Raises:
        TrainingError: Not even one sequence fits.
    """
    num_moments = 4 if averages_weights else 2  # with the average, and in an evaluation the training weights
    share = plan.global_batch_size // accelerator.num_processes
    sizes = [size for size in range(1, most + 1) if share % size == 0]

    def run_trial(size: int) -> None:
        """Run two micro-batches, with the optimizer state allocated; the second one accumulates gradients."""
        _reserved = _reserve_optimizer_state(accelerator, model, num_moments)
        ids = torch.zeros(size, sequence_length, dtype=torch.int64, device=accelerator.device)
        for _ in range(2):
            with accelerator.autocast():
                loss = loss_function(model, ids, ids)
            loss.backward()  # type: ignore[no-untyped-call]

    def fits(size: int) -> bool:
        fits_here = _fits(accelerator.device, model, partial(run_trial, size))
        num_fits = accelerator.reduce(torch.tensor(float(fits_here), device=accelerator.device), "sum")
        return bool(num_fits.item() == accelerator.num_processes)

    size = largest_that_fits(sizes, fits)
    if size is None:
        raise TrainingError(
            f"Not even one sequence of {sequence_length} tokens fits in memory on every process, next to the weights, "
            f"gradients and optimizer state. {MEMORY_ADVICE}"
        )
    return BatchPlan(plan.global_batch_size, size, share // size)


def largest_that_fits(sizes: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """Find the largest size that fits, by bisection; None if none does.

    Args:
        sizes: Sizes in ascending order.
        fits: Monotonic predicate: if a size fits, every smaller one does.
    """
    low, high = 0, len(sizes)  # sizes below index `low` fit, those from `high` on do not
    while low < high:
        middle = (low + high) // 2
        if fits(sizes[middle]):
            low = middle + 1
        else:
            high = middle
    return sizes[low - 1] if low else None


def _fits(device: torch.device, model: nn.Module, run_trial: Callable[[], None]) -> bool:
    """Return whether a trial fits on this rank; its memory is freed, and is not counted in the logged peak."""
    try:
        with trial(model):
            model.train()
            run_trial()  # a function, so that its tensors are freed
    except torch.OutOfMemoryError:
        return False
    else:
        return True
    finally:
        model.zero_grad(set_to_none=True)
        clear_device_cache(garbage_collection=True)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)


def _reserve_optimizer_state(accelerator: Accelerator, model: nn.Module, num_moments: int) -> list[torch.Tensor]:
    """Allocate as much memory as the optimizer's moments, and DDP's copy of the gradients, will take."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if uses_fsdp(accelerator):
        return [p.new_empty(num_moments * p.numel() // accelerator.num_processes) for p in trainable]
    num_copies = num_moments if accelerator.num_processes == 1 else num_moments + 1
    return [p.new_empty(num_copies * p.numel()) for p in trainable]
