"""What makes a folder a checkpoint: a manifest, and files that are the ones it describes."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from homebrew.checkpoint.pieces import find_pieces, join
from homebrew.checkpoint.verified_files import is_regular, read_bounded, read_verified, verify
from homebrew.errors import CorruptCheckpoint

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
MAX_MANIFEST_BYTES = 1 << 20
MAX_STATE_BYTES = 16 << 20
FOLDER = re.compile(r"step-(\d{8})", re.ASCII)
"""A checkpoint's folder in its run's; a copy of it may have any other name."""

_MAX_HEADER_BYTES = 16 << 20
_TENSORS = ".safetensors"
_FILE = re.compile(r"[a-z0-9][a-z0-9_.-]*\.safetensors")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Entry:
    """What a manifest says of a file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The step a checkpoint is of, and its files."""

    step: int
    score: float | None
    """The evaluation loss, finite."""
    files: Mapping[str, Entry]

    def to_json(self) -> bytes:
        """The file's bytes."""
        return json.dumps({"format": FORMAT} | asdict(self), indent=1, allow_nan=False).encode()

    @classmethod
    def from_json(cls, data: bytes, path: Path) -> Self:
        """Read a manifest, its form checked.

        Args:
            data: the file's bytes.
            path: where they are from, for messages; a folder named for a step must be that step's.

        Raises:
            CorruptCheckpoint: it is malformed.
        """
        value = _parse_json(data, path)
        step, score, files = value.get("step"), value.get("score"), value.get("files")
        if not (
            type(value.get("format")) is int
            and value["format"] == FORMAT
            and type(step) is int
            and 0 <= step < 10**8
            and (FOLDER.fullmatch(path.parent.name) is None or path.parent.name == f"step-{step:08}")
            and (score is None or (type(score) is float and math.isfinite(score)))
            and isinstance(files, dict)
            and STATE in files
            and all((name == STATE or _FILE.fullmatch(name)) and _is_entry(entry) for name, entry in files.items())
        ):
            raise CorruptCheckpoint(f"{path} is not a checkpoint's manifest (format {FORMAT}).")
        manifest = cls(step, score, {name: Entry(entry["size"], entry["sha256"]) for name, entry in files.items()})
        manifest.pieces(path)
        return manifest

    def pieces(self, path: Path) -> dict[str, list[str]]:
        """Its tensor files, each with the files that hold it, in order, all without suffix.

        Raises:
            CorruptCheckpoint: a piece is missing; the message names `path`.
        """
        return find_pieces((name.removesuffix(_TENSORS) for name in self.files if name.endswith(_TENSORS)), path)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files have been verified."""

    path: Path
    step: int
    state: dict[str, Any]
    """What `state.json` holds."""
    manifest: Manifest

    @property
    def names(self) -> tuple[str, ...]:
        """Its tensor files, without suffix; one in several pieces counts as one."""
        return tuple(self.manifest.pieces(self.path / MANIFEST))

    def files(self) -> dict[str, dict[str, Tensor]]:
        """All tensors, on the CPU, by file and name.

        Raises:
            CorruptCheckpoint: a file has changed, is no safetensors file, or holds a number that is not finite.
        """
        return {name: self.tensors(name) for name in self.names}

    def tensors(self, name: str) -> dict[str, Tensor]:
        """One file's tensors, on the CPU; if it is in pieces they are put together, one in memory at a time.

        Args:
            name: one of `names`.

        Raises:
            CorruptCheckpoint: as `files`, or the pieces do not fit together.
        """
        pieces = self.manifest.pieces(self.path / MANIFEST)[name]
        if pieces == [name]:
            return self._read(name)
        num_bytes = sum(self.manifest.files[f"{piece}{_TENSORS}"].size for piece in pieces)
        return join(((self.path / f"{piece}{_TENSORS}", self._read(piece)) for piece in pieces), max_bytes=num_bytes)

    def _read(self, name: str) -> dict[str, Tensor]:
        path = self.path / f"{name}{_TENSORS}"
        tensors = parse_tensors(read_verified(path, **asdict(self.manifest.files[path.name])), path)
        if bad := not_finite(name, tensors):
            raise CorruptCheckpoint(f"{path}: {bad} holds numbers that are not finite.")
        return tensors


def open_checkpoint(path: Path) -> Checkpoint:
    """Verify a checkpoint folder: every file its manifest names is there, and is the one it describes.

    Files it does not name are neither read nor minded.

    Raises:
        CorruptCheckpoint: a file is missing, or not the one its manifest describes.
    """
    manifest = read_manifest(path)
    for name, entry in manifest.files.items():
        if name != STATE:
            verify(path / name, **asdict(entry))
    entry = manifest.files[STATE]
    if entry.size > MAX_STATE_BYTES:
        raise CorruptCheckpoint(f"{path / STATE} has {entry.size:,} bytes; at most {MAX_STATE_BYTES:,} are expected.")
    state = parse_state(read_verified(path / STATE, **asdict(entry)), path / STATE, manifest)
    return Checkpoint(path, manifest.step, state, manifest)


def read_manifest(path: Path) -> Manifest:
    """A checkpoint folder's manifest, its form checked.

    Raises:
        CorruptCheckpoint: there is none, or it is malformed.
    """
    return Manifest.from_json(read_bounded(path / MANIFEST, max_bytes=MAX_MANIFEST_BYTES), path / MANIFEST)


def has_its_files(path: Path, manifest: Manifest) -> bool:
    """Whether a folder holds files of the names and sizes its manifest tells, and no others."""
    named = {path / name for name in manifest.files} | {path / MANIFEST}
    return set(path.iterdir()) == named and all(
        is_regular(path / name, size=entry.size) for name, entry in manifest.files.items()
    )


def state_to_json(state: Mapping[str, Any], step: int, score: float | None) -> bytes:
    """The bytes of `state.json`: beside the state what the manifest must agree with."""
    return json.dumps({"step": step, "score": score, "state": state}).encode()


def parse_state(data: bytes, path: Path, manifest: Manifest) -> dict[str, Any]:
    """The state in `state.json`.

    Args:
        data: the file's bytes.
        path: where they are from, for messages.
        manifest: what it must belong to.

    Raises:
        CorruptCheckpoint: it is malformed, or belongs to another manifest.
    """
    value = _parse_json(data, path)
    state = value.get("state")
    if (value.get("step"), value.get("score")) != (manifest.step, manifest.score) or not isinstance(state, dict):
        raise CorruptCheckpoint(f"{path} does not belong to its manifest.")
    return state


def parse_tensors(data: bytes, path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Args:
        data: the file's bytes.
        path: where they are from, for messages.

    Raises:
        CorruptCheckpoint: it is malformed.
    """
    if int.from_bytes(data[:8], "little") > _MAX_HEADER_BYTES:
        raise CorruptCheckpoint(f"{path} is not a safetensors file: its header is too long.")
    try:
        return safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError, TypeError, AssertionError, RuntimeError) as error:
        raise CorruptCheckpoint(f"{path} is not a safetensors file: {error!r}.") from error


def not_finite(name: str, tensors: Mapping[str, Tensor]) -> str | None:
    """The first tensor with a number that is not finite, in a file of that name without suffix.

    Random states may hold one: NaN there stands for a number not drawn yet.
    """
    if name.startswith("rng-"):
        return None
    return next((key for key, tensor in tensors.items() if not _is_finite(tensor)), None)


def _is_finite(tensor: Tensor) -> bool:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    if tensor.element_size() == 1:
        tensor = tensor.float()  # the eight-bit floats have no isfinite of their own
    return bool(tensor.isfinite().all())


def _is_entry(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and type(entry.get("size")) is int
        and entry["size"] >= 0
        and isinstance(entry.get("sha256"), str)
        and _SHA256.fullmatch(entry["sha256"]) is not None
    )


def _parse_json(data: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(data, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"{path} is not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise CorruptCheckpoint(f"{path} must hold a JSON object.")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose names differ: of two that one flipped bit has made equal, Python would drop the first."""
    if len(value := dict(pairs)) < len(pairs):
        raise ValueError("an object has a name twice")
    return value
