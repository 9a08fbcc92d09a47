"""The mean loss over a dataset, exact however many processes share the work."""

from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import Dataset

from homebrew.constants import IGNORE_INDEX
from homebrew.data.loader import eval_batches
from homebrew.distributed.fsdp import reshard
from homebrew.errors import DataError
from homebrew.generation.generate import eval_mode


@torch.no_grad()
def mean_loss(
    accelerator: Accelerator,
    model: nn.Module,
    dataset: Dataset[Any],
    *,
    micro_batch_size: int,
    vocab_size: int,
    max_batches: int | None = None,
    eagerly: bool = False,
) -> tuple[float, int]:
    """The mean loss over a dataset; every process calls this.

    Args:
        accelerator: of the run.
        model: as `prepare` returned it; its training mode is as before afterwards.
        dataset: of (input_ids, targets), each (T,), int64.
        micro_batch_size: sequences in a forward pass.
        vocab_size: ids must be below it.
        max_batches: micro-batches of a process; the whole dataset if None.
        eagerly: not compiled, though the model may be.

    Returns:
        Nats a scored target, and how many there were, over all processes.

    Raises:
        DataError: there were none.
    """
    exact = torch.float32 if accelerator.device.type == "mps" else torch.float64
    totals = torch.zeros(2, dtype=exact, device=accelerator.device)  # sum of losses, scored targets
    with eval_mode(model), torch.compiler.set_stance("force_eager") if eagerly else nullcontext():
        for input_ids, targets in eval_batches(
            dataset,
            micro_batch_size=micro_batch_size,
            rank=accelerator.process_index,
            num_ranks=accelerator.num_processes,
            device=accelerator.device,
            vocab_size=vocab_size,
            max_batches=max_batches,
        ):
            count = (targets != IGNORE_INDEX).sum()
            totals += torch.stack([model(input_ids, targets) * count, count])
    reshard(accelerator, model)
    loss_sum, num_tokens = accelerator.reduce(totals, "sum").tolist()
    if not num_tokens:
        raise DataError(f"No target is scored: all that were read are {IGNORE_INDEX}. Evaluate on other samples.")
    return loss_sum / num_tokens, int(num_tokens)
