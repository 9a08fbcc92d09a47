"""Loads sharded tensors from disk.

A folder of shards is what `HuggingFaceStorageWriter(save_distributed=True)` writes: one safetensors file per rank, with
the offsets of its shards in the file's metadata. There is no index file, so the reader of torch.distributed.checkpoint
takes each tensor's size from its shards. This module adds two checks that the reader lacks: the shards must cover their
tensors, and the full tensors must not be larger than the files.
"""

import math
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from homebrew.bounded_readers import open_file, read_header
from homebrew.errors import CorruptCheckpoint


def load_shards(folder: Path, files: Collection[str], *, max_bytes: int) -> dict[str, Tensor]:
    """Load full tensors from a folder of shards onto the CPU. Not collective: no process group is needed.

    Args:
        folder: Folder of shards.
        files: Names of its files, which have been verified.
        max_bytes: Maximum size of the full tensors.

    Raises:
        CorruptCheckpoint: The folder holds other safetensors files; a file is malformed; or the shards do not cover
            each tensor exactly once.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    if folder.is_symlink() or {file.name for file in folder.glob("*.safetensors")} != set(files):
        raise CorruptCheckpoint(f"{folder} is a link, or holds safetensors files that are not in the manifest.")
    for name in files:
        with open_file(folder / name, CorruptCheckpoint) as (file, _):
            read_header(file, folder / name, CorruptCheckpoint)
    try:
        reader = HuggingFaceStorageReader(str(folder))
        metadata: dict[str, Any] = reader.read_metadata().state_dict_metadata
        chunks = [chunk for info in metadata.values() for chunk in info.chunks]
        if any(number < 0 for chunk in chunks for number in (*chunk.offsets, *chunk.sizes)):
            raise CorruptCheckpoint(f"{folder}: a shard has a negative offset or size.")
        num_bytes = sum(math.prod(info.size) * info.properties.dtype.itemsize for info in metadata.values())
        if num_bytes > max_bytes:
            raise CorruptCheckpoint(f"{folder}: its tensors have {num_bytes:,} bytes, more than its files can hold.")
        for name, info in metadata.items():
            if not _is_covered(info):
                raise CorruptCheckpoint(f"{folder}: the shards of {name} do not cover {tuple(info.size)} exactly once.")
        tensors = {name: torch.empty(info.size, dtype=info.properties.dtype) for name, info in metadata.items()}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # intended: one process reads
            load(tensors, storage_reader=reader, no_dist=True)
    except CorruptCheckpoint:
        raise
    except (Exception, CheckpointException) as error:  # whatever malformed metadata makes PyTorch raise
        raise CorruptCheckpoint(f"{folder} does not hold valid shards: {error!r}.") from error
    return tensors


def _is_covered(info: Any) -> bool:  # noqa: ANN401 - torch.distributed.checkpoint.metadata.TensorStorageMetadata
    """Return whether a tensor's shards hold each of its elements exactly once."""
    covered = torch.zeros(info.size, dtype=torch.bool)
    num_elements = 0
    for chunk in info.chunks:
        if len(chunk.sizes) != len(info.size):
            return False
        covered[tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))] = True
        num_elements += math.prod(chunk.sizes)
    return num_elements == covered.numel() and bool(covered.all())
