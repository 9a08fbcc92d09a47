"""Tensors that several files hold the rows of, each file a piece.

Where processes share tensors out, each can write what it has. `model-00002-of-00004.safetensors` is the second of
the four files that together are what `model.safetensors` would be. Of a shared tensor it holds consecutive rows, along
the first dimension, and beside them which: `<name>[rows]`, int64 (2,), the first one's number and how many the whole
tensor has. A tensor without rows is whole.
"""

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn

from homebrew.errors import CheckpointError, CorruptCheckpoint

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

ROWS = "[rows]"
_PIECE = re.compile(r"(.+)-\d{5}-of-(\d{5})", re.ASCII)


def piece_name(name: str, index: int, count: int) -> str:
    """The file of a piece, without suffix; `index` counts from 0, the name from 1."""
    return f"{name}-{index + 1:05}-of-{count:05}"


def find_pieces(names: Iterable[str], path: Path) -> dict[str, list[str]]:
    """Which files hold what, in order: a file that is no piece holds itself.

    Args:
        names: of files, without suffix.
        path: where they are named, for messages.

    Raises:
        CorruptCheckpoint: a piece is missing, or one too many.
    """
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        match = _PIECE.fullmatch(name)
        found.setdefault(match[1] if match else name, []).append(name)
    for whole, pieces in found.items():
        match = _PIECE.fullmatch(pieces[-1])
        expected = [piece_name(whole, i, int(match[2])) for i in range(int(match[2]))] if match else [whole]
        if wrong := sorted(set(pieces) ^ set(expected)):
            kind = "lacks" if wrong[0] in expected else "has beside the others"
            raise CorruptCheckpoint(f"{path} {kind} {wrong[0]}.safetensors, a piece of {whole}.")
    return found


def my_shard(model: nn.Module) -> tuple[int, int] | None:
    """Which of how many shards this process has; None if a process of another copy writes it.

    Args:
        model: sharded by rows, as FSDP2 does.
    """
    parameter = next(parameter for parameter in model.parameters() if _is_sharded(parameter))
    mesh, shard = parameter.device_mesh, None
    for dim, placement in enumerate(parameter.placements):
        index = mesh.get_local_rank(dim)
        if placement.is_shard():
            shard = index, mesh.size(dim)
        elif index > 0:
            return None
    return shard


def own_rows(tensor: Tensor) -> Tensor:
    """What this process has of a tensor."""
    return tensor.to_local() if _is_sharded(tensor) else tensor


def check_placements(tensors: Mapping[str, Tensor]) -> None:
    """Refuse what `cut` cannot: these tensors' rows would not come together again.

    Raises:
        CheckpointError: a tensor is neither sharded by rows nor the same on every process.
    """
    for name, tensor in tensors.items():
        if _is_sharded(tensor) and not all(p.is_replicate() or p.is_shard(0) for p in tensor.placements):
            raise CheckpointError(
                f"{name} is shared out as {tensor.placements}: processes can write together only what is sharded by "
                f"rows, Shard(0), or whole. Raise gather_limit_bytes, and process 0 writes alone."
            )


def cut(tensors: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
    """The rows that this process has of each tensor, and which they are; whole tensors are the first shard's.

    Args:
        tensors: sharded by rows, or the same on every process, plain or replicated.
        index: of this process's shard.
    """
    pieces = {}
    for name, tensor in tensors.items():
        if _is_sharded(tensor) and any(placement.is_shard() for placement in tensor.placements):
            [chunk] = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]
            if chunk.sizes[0]:  # of few rows, some shards have none
                pieces[name] = own_rows(tensor)
                pieces[name + ROWS] = torch.tensor([chunk.offsets[0], len(tensor)])
        elif index == 0:
            pieces[name] = own_rows(tensor)
    return pieces


def join(files: Iterable[tuple[Path, Mapping[str, Tensor]]], *, max_bytes: int) -> dict[str, Tensor]:
    """Whole tensors from their pieces, one file at a time.

    Args:
        files: in order; of each its path and its tensors.
        max_bytes: the whole tensors' memory; more is an error, found before it is allocated.

    Raises:
        CorruptCheckpoint: a tensor's pieces are not all its rows, each once and in order.
    """
    whole: dict[str, Tensor] = {}
    filled: dict[str, int] = {}
    path = None
    for path, tensors in files:
        for name, piece in tensors.items():
            if name.endswith(ROWS):
                if name.removesuffix(ROWS) not in tensors:
                    raise CorruptCheckpoint(f"{path} has {name}, but not the rows.")
                continue
            first, total = _rows(path, name, tensors)
            if name not in whole:
                shape = (total, *piece.shape[1:]) if piece.dim() else ()
                # A row of no bytes counts too: else a size of 0 would let the others be any.
                max_bytes -= math.prod(max(size, 1) for size in shape) * piece.element_size()
                if max_bytes < 0:
                    raise CorruptCheckpoint(f"{path}: {name} is of shape {shape}, more than its files can hold.")
                whole[name], filled[name] = torch.empty(shape, dtype=piece.dtype), 0
            target, end = whole[name], first + (len(piece) if piece.dim() else 1)
            alike = (piece.dtype, piece.shape[1:]) == (target.dtype, target.shape[1:])
            if not alike or total != (len(target) if target.dim() else 1) or first != filled[name] or end > total:
                raise CorruptCheckpoint(
                    f"{path}: rows {first} to {end} of {total} of {name}, {piece.dtype} of shape {tuple(piece.shape)}, "
                    f"do not go on from row {filled[name]} of {target.dtype} of shape {tuple(target.shape)}."
                )
            (target[first:end] if piece.dim() else target).copy_(piece)
            filled[name] = end
    for name, tensor in whole.items():
        if tensor.dim() and filled[name] < len(tensor):
            raise CorruptCheckpoint(f"{path} is the last piece, and {name} has {filled[name]} of {len(tensor)} rows.")
    return whole


def _is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    return hasattr(tensor, "device_mesh")  # DTensor's import takes long


def _rows(path: Path, name: str, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """The first row that a piece holds, and how many the whole tensor has; of a number, one."""
    piece, rows = tensors[name], tensors.get(name + ROWS)
    if rows is None:
        return 0, len(piece) if piece.dim() else 1
    if piece.dim() == 0 or rows.dtype != torch.int64 or rows.shape != (2,) or rows.min() < 0:
        raise CorruptCheckpoint(f"{path}: {name + ROWS} does not say which rows these are.")
    first, total = rows.tolist()
    return first, total
