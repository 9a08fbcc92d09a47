"""A checkpoint's files, written into the folder it is made in, the manifest last."""

import contextlib
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from homebrew.checkpoint.manifest import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    MAX_STATE_BYTES,
    STATE,
    Entry,
    Manifest,
    not_finite,
    parse_state,
    state_to_json,
)
from homebrew.checkpoint.safetensors_writer import serialised
from homebrew.checkpoint.verified_files import write_durably
from homebrew.errors import CheckpointError, HomebrewError, NonFiniteError
from homebrew.io import fsync_directory

Files = Mapping[str, Mapping[str, Tensor]]
"""Tensors by name, by file name without suffix."""
Others = Callable[[], Mapping[str, Entry]]
"""Waits until other processes have written their files into a checkpoint's folder, and says which these are."""


def write_files(folder: Path, step: int, files: Files) -> dict[str, Entry]:
    """Write tensor files and wait until they are on the disk.

    Args:
        folder: to write them into.
        step: that they are of, for messages.
        files: CPU tensors.

    Returns:
        The files, for the manifest.

    Raises:
        CheckpointError: a file could not be written.
        NonFiniteError: a tensor holds a number that is not finite.
    """
    entries = {}
    for name, tensors in files.items():
        if bad := not_finite(name, tensors):
            raise NonFiniteError(f"The checkpoint of step {step} was not saved: {bad} in {name} is not finite.")
        entries[f"{name}.safetensors"] = _write(folder / f"{name}.safetensors", *serialised(tensors))
    return entries


def write_checkpoint(
    folder: Path, step: int, files: Files, state: Mapping[str, Any], score: float | None, others: Others | None
) -> None:
    """Write a checkpoint's files into its folder and wait until they are on the disk, the manifest last.

    Raises:
        CheckpointError: a file could not be written, or could not be read again as what it is.
        NonFiniteError: a tensor holds a number that is not finite.
    """
    try:
        entries = write_files(folder, step, files)
    except BaseException:
        if others is not None:
            with contextlib.suppress(HomebrewError):  # the error is the one to tell of
                others()  # until then the folder is not to be cleared: they write into it
        raise
    if others is not None:
        entries |= others()
    facts = state_to_json(state, step, score)
    entries[STATE] = _write(folder / STATE, facts)
    manifest = Manifest(step, score, entries)
    data = manifest.to_json()
    if len(facts) > MAX_STATE_BYTES or len(data) > MAX_MANIFEST_BYTES:
        raise CheckpointError(
            f"{folder}: a state of {len(facts):,} bytes is too long, or {len(entries)} files too many."
        )
    parse_state(facts, folder / STATE, Manifest.from_json(data, folder / MANIFEST))
    _write(folder / MANIFEST, data)
    fsync_directory(folder)


def _write(path: Path, *pieces: bytes | memoryview) -> Entry:
    """Write a file and describe it for the manifest."""
    write_durably(path, *pieces)
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return Entry(sum(map(len, pieces)), digest.hexdigest())
