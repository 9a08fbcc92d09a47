"""Collective operations besides the gradients' all-reduce: loss weights, flags, bytes and JSON, never pickles."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor

from homebrew import errors
from homebrew.constants import IGNORE_INDEX
from homebrew.data.loader import Batch
from homebrew.errors import HomebrewError
from homebrew.io import strict_json


def micro_batch_weights(accelerator: Accelerator, micro_batches: Sequence[Batch]) -> Tensor:
    """Return each local micro-batch's fraction of the step's scored targets over all ranks; collective.

    Args:
        accelerator: The run's Accelerator.
        micro_batches: This rank's (input_ids, targets), each (B, T), int64.

    Returns:
        (number of micro-batches,), float32; the sum over all ranks is 1.
    """
    if accelerator.num_processes == len(micro_batches) == 1:
        return torch.ones(1, device=accelerator.device)  # counting takes too long in a small model's step
    counts = torch.stack([(targets != IGNORE_INDEX).sum() for _, targets in micro_batches])
    num_targets: Tensor = accelerator.reduce(counts.sum(), "sum")
    return counts / num_targets.clamp(min=1)


class FlagExchange:
    """Combines flags of all ranks without waiting for the device or for other ranks.

    With several ranks, each call returns the flags of the previous call, whose all-reduce has completed by then. Every
    rank reads the same result at the same step.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._pending: tuple[Tensor, torch.cuda.Event | None] | None = None

    def exchange(self, flags: list[float]) -> list[bool]:
        """Send this rank's flags and return which flags any rank sent in the previous call; collective.

        Args:
            flags: 0 or 1 each; the same number of flags in every call and on every rank.

        Returns:
            One bool per flag; all False in the first call. With one rank, this call's own flags.
        """
        if self._accelerator.num_processes == 1:
            return [flag > 0 for flag in flags]
        previous = [0.0] * len(flags)
        if self._pending is not None:
            sums, event = self._pending
            if event is not None:
                event.synchronize()
            previous = sums.tolist()
        sums = self._accelerator.reduce(torch.tensor(flags).to(self._accelerator.device, non_blocking=True), "sum")
        event = None
        if sums.is_cuda:
            sums, event = sums.to("cpu", non_blocking=True), torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        self._pending = (sums, event)
        return [value > 0 for value in previous]


def broadcast_bytes(accelerator: Accelerator, data: bytes) -> bytes:
    """Return rank 0's bytes on every rank; the other ranks' `data` is ignored; collective."""
    if accelerator.num_processes == 1:
        return data
    size = broadcast(torch.tensor([len(data)], device=accelerator.device))
    buffer = torch.zeros(int(size), dtype=torch.uint8, device=accelerator.device)
    if accelerator.is_main_process:
        buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(accelerator.device)
    return _to_bytes(broadcast(buffer))


def broadcast_tensors(accelerator: Accelerator, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield rank 0's tensors by name, one at a time, on every rank; the other ranks' are ignored; collective.

    With several ranks, the results are copies on the device. With one rank, they are the given tensors.
    """
    if accelerator.num_processes == 1:
        yield from tensors.items()
        return
    layout = {name: (list(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in tensors.items()}
    for name, (shape, dtype) in json.loads(broadcast_bytes(accelerator, strict_json(layout).encode())).items():
        buffer = torch.empty(shape, dtype=getattr(torch, dtype), device=accelerator.device)
        if accelerator.is_main_process:
            buffer.copy_(tensors[name])
        broadcast(buffer.view(-1).view(torch.uint8))  # in place; as bytes, because not every backend has every dtype
        yield name, buffer


def gather_bytes(accelerator: Accelerator, data: bytes) -> list[bytes]:
    """Return every rank's bytes, ordered by rank, on every rank; collective."""
    if accelerator.num_processes == 1:
        return [data]
    buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(accelerator.device)
    sizes = accelerator.gather(torch.tensor([len(data)], device=accelerator.device)).tolist()
    padded = torch.nn.functional.pad(buffer, (0, max(sizes) - len(data)))
    buffers = accelerator.gather(padded[None])  # (ranks, longest)
    return [_to_bytes(buffer[:size]) for buffer, size in zip(buffers, sizes, strict=True)]


def run_on_main(accelerator: Accelerator, function: Callable[[], Any]) -> Any:  # noqa: ANN401 - any JSON value
    """Call `function` on rank 0 only, and return its JSON value, or raise its HomebrewError, on every rank; collective.

    Errors of other classes are raised on rank 0 only.
    """
    response: dict[str, Any] = {}
    if accelerator.is_main_process:
        try:
            response = {"result": function()}
        except HomebrewError as error:
            broadcast_bytes(accelerator, strict_json(_describe(error)).encode())
            raise
    response = json.loads(broadcast_bytes(accelerator, strict_json(response).encode()))
    if "error" in response:
        raise _rebuild(response)
    return response["result"]


def run_on_all(accelerator: Accelerator, function: Callable[[], Any]) -> list[Any]:
    """Call `function` on every rank, and return all JSON values by rank, or raise the first HomebrewError; collective.

    Errors of other classes are raised on their own rank only.
    """
    response: dict[str, Any] = {}
    try:
        response = {"result": function()}
    except HomebrewError as error:
        response = _describe(error)
    responses = [json.loads(data) for data in gather_bytes(accelerator, strict_json(response).encode())]
    for rank, response in enumerate(responses):
        if "error" in response:
            raise _rebuild(response, f"Rank {rank}: ")
    return [response["result"] for response in responses]


def _describe(error: HomebrewError) -> dict[str, str]:
    """Return the JSON from which `_rebuild` makes the error on another rank."""
    return {"error": type(error).__name__, "message": str(error)}


def _rebuild(response: dict[str, str], prefix: str = "") -> HomebrewError:
    error_class: type[HomebrewError] = getattr(errors, response["error"], HomebrewError)
    return error_class(prefix + response["message"])


def _to_bytes(buffer: Tensor) -> bytes:
    return buffer.cpu().numpy().tobytes()
