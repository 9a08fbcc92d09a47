"""The manifest of a checkpoint, and the validation of everything that is read from one."""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from homebrew.bounded_readers import MAX_BYTES, parse_json, parse_tensors, read_bytes
from homebrew.checkpoint.sharded_load import load_shards
from homebrew.checkpoint.tensor_check import find_non_finite
from homebrew.checkpoint.verified_files import Entry, is_regular, read_verified, verify
from homebrew.errors import CorruptCheckpoint
from homebrew.io import strict_json

FORMAT = 4
MANIFEST = "manifest.json"
STATE = "state.json"
FOLDER = re.compile(r"step-(\d{8})", re.ASCII)
"""Name of a checkpoint's folder in a run; a copy may have any other name."""

_TENSORS = ".safetensors"
_TENSOR_FILE = re.compile(r"(?:[a-z0-9][a-z0-9_-]*/)?[a-z0-9][a-z0-9_.-]*\.safetensors")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Manifest:
    """A checkpoint's step and files.

    Args:
        step: Optimizer steps taken.
        score: Evaluation loss of this step; finite, or None if the step was not evaluated.
        files: All files but the manifest, by path relative to the checkpoint.
    """

    step: int
    score: float | None
    files: Mapping[str, Entry]

    def to_json(self) -> bytes:
        """Return the contents of `manifest.json`."""
        return strict_json({"format": FORMAT} | asdict(self), indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes, path: Path) -> Self:
        """Parse and validate a manifest. If the folder of `path` is named after a step, the steps must be equal.

        Raises:
            CorruptCheckpoint: The manifest is malformed, or of another format.
        """
        value = parse_json(data, path, CorruptCheckpoint)
        format_, step, score, files = (value.get(key) for key in ("format", "step", "score", "files"))
        if type(format_) is int and format_ != FORMAT:
            raise CorruptCheckpoint(
                f"{path} has format {format_}, but this version of homebrew reads format {FORMAT}: the checkpoint was "
                f"saved by another version of homebrew. Use that version, or start a new run."
            )
        if not (
            type(format_) is int
            and type(step) is int
            and 0 <= step < 10**8
            and (FOLDER.fullmatch(path.parent.name) is None or path.parent.name == f"step-{step:08}")
            and (score is None or (type(score) is float and math.isfinite(score)))
            and isinstance(files, dict)
            and STATE in files
            and all(name == STATE or _TENSOR_FILE.fullmatch(name) for name in files)
            and not any(f"{name.partition('/')[0]}{_TENSORS}" in files for name in files if "/" in name)
            and all(map(_is_entry, files.values()))
        ):
            raise CorruptCheckpoint(f"{path} is not a valid checkpoint manifest (format {FORMAT}).")
        return cls(step, score, {name: Entry(entry["size"], entry["sha256"]) for name, entry in files.items()})

    def tensor_files(self) -> dict[str, list[str]]:
        """Return the tensor files by name: `model` is either `model.safetensors` or all files in `model/`."""
        groups: dict[str, list[str]] = {}
        for file in self.files:
            if file != STATE:
                groups.setdefault(file.partition("/")[0].removesuffix(_TENSORS), []).append(file)
        return groups


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk whose files have been verified."""

    path: Path
    step: int
    state: dict[str, Any]
    manifest: Manifest

    @property
    def identity(self) -> dict[str, Any]:
        """Identity of the run. It is not validated: it may be any JSON object, not only a result of `run_identity`."""
        identity = self.state.get("identity")
        return identity if isinstance(identity, dict) else {}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensor files, without suffix; sharded tensors have the name of their folder."""
        return tuple(self.manifest.tensor_files())

    def files(self) -> dict[str, dict[str, Tensor]]:
        """Load all tensors onto the CPU, by file name and tensor name; `RunState.check` checks them.

        Raises:
            CorruptCheckpoint: A file has changed, or is not a safetensors file; or shards are missing.
        """
        return {name: self._load(name) for name in self.names}

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Load the full tensors of one of `names`, like `files`; raise CorruptCheckpoint unless they are finite."""
        tensors = self._load(name)
        if bad := find_non_finite(name, tensors):
            raise CorruptCheckpoint(f"{self.path}: {bad} in {name} has values that are not finite.")
        return tensors

    def _load(self, name: str) -> dict[str, Tensor]:
        files = self.manifest.tensor_files()[name]
        path = self.path / files[0]
        if path.parent == self.path:
            data = read_verified(path, self.manifest.files[files[0]])
            return parse_tensors(data, path, CorruptCheckpoint)
        for file in files:  # again: the files may have changed since `open_checkpoint` verified them
            verify(self.path / file, self.manifest.files[file])
        max_bytes = sum(self.manifest.files[file].size for file in files)
        return load_shards(path.parent, {Path(file).name for file in files}, max_bytes=max_bytes)


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint and verify the size and SHA-256 of every file in its manifest.

    Files that are not in the manifest are ignored.

    Raises:
        CorruptCheckpoint: A file is missing, or differs from the manifest.
    """
    manifest = read_manifest(path)
    for name, entry in manifest.files.items():
        if name != STATE:
            verify(path / name, entry)
    entry = manifest.files[STATE]
    if entry.size > MAX_BYTES:
        raise CorruptCheckpoint(f"{path / STATE} has {entry.size:,} bytes; at most {MAX_BYTES:,} are expected.")
    state = parse_state(read_verified(path / STATE, entry), path / STATE, manifest)
    return Checkpoint(path, manifest.step, state, manifest)


def read_manifest(path: Path) -> Manifest:
    """Read a folder's manifest; raise CorruptCheckpoint if it is missing or malformed."""
    return Manifest.from_json(read_bytes(path / MANIFEST, CorruptCheckpoint), path / MANIFEST)


def matches_listing(path: Path, manifest: Manifest) -> bool:
    """Return whether a folder holds exactly the files of its manifest, with the right sizes; contents are not read."""
    expected = {path / name for name in manifest.files} | {path / MANIFEST}
    actual = {file for file in path.rglob("*") if file.is_symlink() or not file.is_dir()}
    return actual == expected and all(
        is_regular(path / name, size=entry.size) for name, entry in manifest.files.items()
    )


def state_to_json(state: Mapping[str, Any], step: int, score: float | None) -> bytes:
    """Return the contents of `state.json`; step and score are repeated there so that they are covered by a hash."""
    return strict_json({"step": step, "score": score, "state": state}).encode()


def parse_state(data: bytes, path: Path, manifest: Manifest) -> dict[str, Any]:
    """Parse and validate `state.json`; raise CorruptCheckpoint if it is malformed or belongs to another manifest."""
    value = parse_json(data, path, CorruptCheckpoint)
    state = value.get("state")
    if (value.get("step"), value.get("score")) != (manifest.step, manifest.score) or not isinstance(state, dict):
        raise CorruptCheckpoint(f"{path} does not belong to its manifest.")
    return state


def _is_entry(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and type(entry.get("size")) is int
        and entry["size"] >= 0
        and isinstance(entry.get("sha256"), str)
        and _SHA256.fullmatch(entry["sha256"]) is not None
    )
