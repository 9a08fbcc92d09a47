"""What processes tell each other besides gradients: bytes and JSON, never pickles."""

import json
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor

from homebrew import errors
from homebrew.errors import HomebrewError


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


def on_main(accelerator: Accelerator, work: Callable[[], Any]) -> Any:  # noqa: ANN401 - any JSON value
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


def _to_bytes(row: Tensor) -> bytes:
    return row.cpu().numpy().tobytes()
