"""What processes tell each other besides gradients: counts, bytes and JSON, never pickles."""

import json
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from homebrew import errors
from homebrew.constants import IGNORE_INDEX
from homebrew.data.loader import Batch
from homebrew.errors import HomebrewError


def target_shares(accelerator: Accelerator, micro_batches: Sequence[Batch]) -> Tensor:
    """What part of a step's scored targets, over all processes, each of this process's micro-batches has.

    Args:
        accelerator: of the run.
        micro_batches: (input_ids, targets), each (B, T), int64.

    Returns:
        (number of micro-batches,), float32.
    """
    if accelerator.num_processes == len(micro_batches) == 1:
        return torch.ones(1, device=accelerator.device)  # the model counts them: a small one's step is soon over
    counts = torch.stack([(targets != IGNORE_INDEX).sum() for _, targets in micro_batches])
    num_targets: Tensor = accelerator.reduce(counts.sum(), "sum")
    return counts / num_targets.clamp(min=1)


def broadcast_bytes(accelerator: Accelerator, data: bytes) -> bytes:
    """The first process's bytes, on every process; the others' argument is not looked at."""
    if accelerator.num_processes == 1:
        return data
    size = broadcast(torch.tensor([len(data)], device=accelerator.device))
    row = torch.zeros(int(size), dtype=torch.uint8, device=accelerator.device)
    if accelerator.is_main_process:
        row = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(accelerator.device)
    return _to_bytes(broadcast(row))


def gather_bytes(accelerator: Accelerator, data: bytes) -> list[bytes]:
    """Every process's bytes, in the order of the processes, on every process."""
    if accelerator.num_processes == 1:
        return [data]
    row = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(accelerator.device)
    sizes = accelerator.gather(torch.tensor([len(data)], device=accelerator.device)).tolist()
    padded = torch.nn.functional.pad(row, (0, max(sizes) - len(data)))
    rows = accelerator.gather(padded[None])  # (processes, longest)
    return [_to_bytes(row[:size]) for row, size in zip(rows, sizes, strict=True)]


def run_on_main(accelerator: Accelerator, work: Callable[[], Any]) -> Any:  # noqa: ANN401 - any JSON value
    """Run `work` on the first process only, and give its result, or its error, to all.

    Args:
        accelerator: of the run.
        work: returns a JSON value.

    Raises:
        HomebrewError: of the class `work` raised, on every process.
    """
    answer: dict[str, Any] = {}
    if accelerator.is_main_process:
        try:
            answer = {"result": work()}
        except HomebrewError as error:
            if accelerator.num_processes == 1:
                raise
            answer = {"error": type(error).__name__, "message": str(error)}
    answer = json.loads(broadcast_bytes(accelerator, json.dumps(answer).encode()))
    if "error" in answer:
        kind: type[HomebrewError] = getattr(errors, answer["error"], HomebrewError)
        raise kind(answer["message"])
    return answer["result"]


def connect(timeout_seconds: float) -> TCPStore | None:
    """A connection to the launcher's store, for what is told beside the collectives, from any thread.

    Args:
        timeout_seconds: how long to wait for the store, now and in each call.

    Returns:
        It, or None where the processes met by other means.
    """
    if "MASTER_ADDR" not in os.environ:
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        return TCPStore(address, port, is_master=False, timeout=timedelta(seconds=timeout_seconds))
    except RuntimeError:
        return None


def is_lost(error: BaseException | None) -> bool:
    """Whether this is a collective's own error: another process is gone, hangs or cannot be reached."""
    if isinstance(error, HomebrewError):
        return False
    return isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _to_bytes(row: Tensor) -> bytes:
    return row.cpu().numpy().tobytes()
