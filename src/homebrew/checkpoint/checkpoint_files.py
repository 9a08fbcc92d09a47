"""Writes the files of one checkpoint into a folder: tensors, `state.json`, and the manifest last."""

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from homebrew.bounded_readers import parse_json, read_header
from homebrew.checkpoint.manifest import MANIFEST, STATE, Manifest, state_to_json
from homebrew.checkpoint.safetensors_writer import serialize
from homebrew.checkpoint.verified_files import Entry, is_regular
from homebrew.errors import CheckpointError
from homebrew.io import fsync_directory, write_durably

TensorFiles = dict[str, dict[str, Tensor]]
"""Tensors by file name without suffix, then by tensor name."""


def write_checkpoint(
    folder: Path,
    step: int,
    files: TensorFiles,
    state: Mapping[str, Any],
    score: float | None,
    shards: Mapping[str, Entry],
) -> None:
    """Write a checkpoint's files into an existing folder and sync them to disk, the manifest last.

    `shards` are files that are already in subfolders of `folder`; `score` is a finite evaluation loss or None.

    Raises:
        OSError: A file could not be written.
        CheckpointError: A shard is missing, or a file exceeds the limits of `bounded_readers`.
    """
    entries = dict(shards)
    for name, tensors in files.items():
        path, buffers = folder / f"{name}.safetensors", serialize(tensors)
        read_header(io.BytesIO(buffers[0]), path, CheckpointError)  # do not write what the reader would reject
        entries[path.name] = _write(path, *buffers)
    state_json = state_to_json(state, step, score)
    parse_json(state_json, folder / STATE, CheckpointError)
    entries[STATE] = _write(folder / STATE, state_json)
    if missing := [name for name, entry in entries.items() if not is_regular(folder / name, size=entry.size)]:
        raise CheckpointError(
            f"{folder} does not have the {missing[0]} that was written to it: the ranks do not share the folder. "
            f"Check that output_dir is on the same file system for every rank."
        )
    data = Manifest(step, score, entries).to_json()
    parse_json(data, folder / MANIFEST, CheckpointError)
    _write(folder / MANIFEST, data)
    for subfolder in sorted({(folder / name).parent for name in shards}):
        fsync_directory(subfolder)
    fsync_directory(folder)


def _write(path: Path, *buffers: bytes | memoryview) -> Entry:
    """Write a file and return its manifest entry."""
    write_durably(path, *buffers)
    digest = hashlib.sha256()
    for buffer in buffers:
        digest.update(buffer)
    return Entry(sum(map(len, buffers)), digest.hexdigest())
