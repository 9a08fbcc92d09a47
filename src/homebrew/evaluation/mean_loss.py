"""Mean loss over a dataset, computed on all ranks."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import Dataset

from homebrew.constants import IGNORE_INDEX
from homebrew.data.collate import Collate
from homebrew.data.loader import eval_batches
from homebrew.distributed.fsdp import reshard
from homebrew.errors import DataError
from homebrew.model.language_model import LossFunction
from homebrew.model.passes import eval_mode, uncompiled


class EvaluationStopped(Exception):  # noqa: N818 - not an error
    """An evaluation was stopped before its end."""


@torch.no_grad()
def mean_loss(
    accelerator: Accelerator,
    model: nn.Module,
    dataset: Dataset[Any],
    *,
    micro_batch_size: int,
    collate: Collate,
    max_batches: int | None,
    eager: bool,
    loss_function: LossFunction,
    should_stop: Callable[[], bool] | None = None,
) -> tuple[float, int]:
    """Compute the mean loss per target over a dataset. Must be called on all ranks.

    The result does not depend on how the samples are divided among ranks: each target counts once.

    Args:
        accelerator: The run's Accelerator.
        model: Result of `Accelerator.prepare`. Its training mode is restored afterwards.
        dataset: Dataset to evaluate on.
        micro_batch_size: Number of samples in a batch of one rank.
        collate: Makes batches of samples.
        max_batches: Maximum number of batches on each rank, or None for all.
        eager: Whether to run a compiled model without compilation, which saves compiling it for evaluation.
        loss_function: Computes the mean loss over the targets of a batch.
        should_stop: Called before each batch, if given. It must return the same value on all ranks.

    Returns:
        Mean loss in nats per target, and the number of targets over all ranks, ignored targets excluded.

    Raises:
        DataError: Every target is ignored.
        EvaluationStopped: `should_stop` returned True.
    """
    dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64  # MPS has no float64
    totals = torch.zeros(2, dtype=dtype, device=accelerator.device)  # total loss, number of targets
    stopped = False
    with eval_mode(model), uncompiled(model) if eager else nullcontext():
        for input_ids, targets in eval_batches(
            dataset,
            micro_batch_size=micro_batch_size,
            rank=accelerator.process_index,
            num_ranks=accelerator.num_processes,
            device=accelerator.device,
            collate=collate,
            max_batches=max_batches,
        ):
            if should_stop is not None and (stopped := should_stop()):
                break
            num_targets = (targets != IGNORE_INDEX).sum()
            loss = loss_function(model, input_ids, targets).to(dtype)
            totals += torch.stack([loss * num_targets, num_targets])
    reshard(accelerator, model)
    if stopped:
        raise EvaluationStopped
    total_loss, total_targets = accelerator.reduce(totals, "sum").tolist()
    if not total_targets:
        raise DataError(
            f"The evaluation has no targets: all are {IGNORE_INDEX}, which is ignored. Evaluate other samples."
        )
    return total_loss / total_targets, int(total_targets)
