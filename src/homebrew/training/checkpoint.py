"""The commit protocol: a checkpoint is there whole, or not at all.

A save writes into a folder of a temporary name, waits for each file to be on the disk, writes the manifest last,
renames the folder, waits for the rename, and only then removes what is no longer kept. A load uses a folder only
once every file in it is the one its manifest describes.
"""

import hashlib
import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from homebrew.errors import CheckpointError, ConfigError, CorruptCheckpoint
from homebrew.training.files import (
    hash_regular,
    read_regular,
    remove_folder,
    rename,
    sync_folder,
    write_durably,
)

Files = Mapping[str, Mapping[str, Tensor]]
"""Tensors by name, by file name without suffix."""

FORMAT = 1
_NAME = re.compile(r"step-(\d{8})")
_TEMPORARY = re.compile(r"\.(step-\d{8})\.(writing|removing)")
_FILE = re.compile(r"[a-z0-9][a-z0-9_.-]*\.(safetensors|json)")
_MANIFEST_BYTES = 1 << 20
_STATE_BYTES = 16 << 20


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files have been verified."""

    path: Path
    step: int
    state: dict[str, Any]
    """What `state.json` holds."""
    names: tuple[str, ...]
    """Its tensor files, without suffix."""

    def files(self) -> dict[str, dict[str, Tensor]]:
        """All tensors, on the CPU, by file and name.

        Raises:
            CorruptCheckpoint: a file is no safetensors file, or holds a float that is not finite.
        """
        return {name: self.tensors(name) for name in self.names}

    def tensors(self, name: str) -> dict[str, Tensor]:
        """One file's tensors, on the CPU.

        Args:
            name: one of `names`.

        Raises:
            CorruptCheckpoint: it is no safetensors file, or holds a float that is not finite.
        """
        return _read_tensors(self.path / f"{name}.safetensors")


class CheckpointStore:
    """The checkpoints of a run, in `<output_dir>/checkpoints`.

    Args:
        output_dir: the run's folder.
        keep_last: newest checkpoints that are kept.
        keep_every: those at multiples of this step are kept for good.
    """

    def __init__(self, output_dir: str | Path, *, keep_last: int = 2, keep_every: int | None = None) -> None:
        self.folder = Path(output_dir) / "checkpoints"
        self._keep_last = keep_last
        self._keep_every = keep_every
        self._writer: threading.Thread | None = None
        self._error: BaseException | None = None

    def prepare(self) -> None:
        """Make the folder.

        Raises:
            ConfigError: it cannot be made or written to.
        """
        probe = self.folder / ".probe"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise ConfigError(
                f"output_dir={str(self.folder.parent)!r} cannot be written to: {error.strerror}. Choose another folder."
            ) from error

    def path(self, step: int) -> Path:
        """The folder of a step's checkpoint, whether it exists or not."""
        return self.folder / f"step-{step:08}"

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, whole or not, in order."""
        if not self.folder.is_dir():
            return []
        found = (_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def save(self, step: int, files: Files, state: Mapping[str, Any], *, score: float | None = None) -> Path:
        """Write a checkpoint, and remove those no longer kept.

        Args:
            step: optimizer steps taken.
            files: CPU tensors.
            state: JSON.
            score: the evaluation loss; the lowest of those kept is kept.

        Returns:
            Its folder.

        Raises:
            CheckpointError: it could not be written; what was there before still is, and nothing else.
        """
        path = self.path(step)
        temporary = self.folder / f".{path.name}.writing"
        self._clean()
        try:
            temporary.mkdir()
            entries = {}
            for name, tensors in files.items():
                data = safetensors.torch.save(dict(tensors))
                entries[f"{name}.safetensors"] = _write(temporary / f"{name}.safetensors", data)
            facts = {"step": step, "score": score, "state": state}
            entries["state.json"] = _write(temporary / "state.json", json.dumps(facts).encode())
            manifest = {"format": FORMAT, "step": step, "score": score, "files": entries}
            _write(temporary / "manifest.json", json.dumps(manifest, indent=1).encode())
            sync_folder(temporary)
            if path.exists():
                rename(path, self.folder / f".{path.name}.removing")
            rename(temporary, path)
            sync_folder(self.folder)
        except BaseException as error:
            remove_folder(temporary)
            if isinstance(error, OSError):
                raise CheckpointError(f"{path} could not be written: {error}.") from error
            raise
        self._prune()
        return path

    def save_in_background(
        self, step: int, files: Files, state: Mapping[str, Any], *, score: float | None = None
    ) -> None:
        """`save`, in a thread; one at a time, so this waits for the last.

        Raises:
            CheckpointError: an earlier one failed.
        """
        self.wait()

        def work() -> None:
            try:
                self.save(step, files, state, score=score)
            except BaseException as error:
                self._error = error

        self._writer = threading.Thread(target=work, name=f"checkpoint-{step}")
        self._writer.start()

    @property
    def failed(self) -> bool:
        """Whether a background save has failed."""
        return self._error is not None

    def check(self) -> None:
        """Raise what a background save has failed with."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Wait for a background save, and raise what it failed with."""
        self.close()
        self.check()

    def close(self) -> None:
        """Wait for a background save, whatever becomes of it."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None

    def latest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint that is whole.

        Returns:
            It, or None where there is none; and why newer ones were passed over.
        """
        passed_over: list[str] = []
        for step in reversed(self.steps()):
            try:
                return self.open(self.path(step)), passed_over
            except CorruptCheckpoint as error:
                passed_over.append(str(error))
        return None, passed_over

    def open(self, path: str | Path) -> Checkpoint:
        """Verify a checkpoint.

        Raises:
            CorruptCheckpoint: it is not whole.
        """
        return open_checkpoint(Path(path))

    def _clean(self) -> None:
        """Remove what a killed save or prune has left."""
        for path in self.folder.iterdir():
            if _TEMPORARY.fullmatch(path.name):
                remove_folder(path)

    def _prune(self) -> None:
        """Remove whole checkpoints that are neither recent, nor at a kept step, nor the best."""
        scores: dict[int, float | None] = {}
        for step in self.steps():
            try:
                scores[step] = read_manifest(self.path(step))["score"]
            except CorruptCheckpoint:
                continue  # not ours to judge, nor to count
        kept = set(sorted(scores)[-self._keep_last :])
        kept |= {step for step in scores if self._keep_every and step % self._keep_every == 0}
        scored = [(score, step) for step, score in scores.items() if score is not None]
        if scored:
            kept.add(min(scored)[1])
        for step in scores.keys() - kept:
            removing = self.folder / f".{self.path(step).name}.removing"
            rename(self.path(step), removing)
            remove_folder(removing)


def open_checkpoint(path: Path) -> Checkpoint:
    """Verify a checkpoint folder.

    Raises:
        CorruptCheckpoint: a file is missing, or not the one its manifest describes.
    """
    manifest = read_manifest(path)
    for name, entry in manifest["files"].items():
        if hash_regular(path / name, size=entry["size"]) != entry["sha256"]:
            raise CorruptCheckpoint(f"{path / name} is not the file its manifest describes: its SHA-256 differs.")
    state = _read_json(path / "state.json", _STATE_BYTES)
    if state.get("step") != manifest["step"] or not isinstance(state.get("state"), dict):
        raise CorruptCheckpoint(f"{path / 'state.json'} does not belong to its manifest.")
    names = tuple(name.removesuffix(".safetensors") for name in manifest["files"] if name.endswith(".safetensors"))
    return Checkpoint(path, manifest["step"], state["state"], names)


def read_manifest(path: Path) -> dict[str, Any]:
    """A checkpoint folder's manifest, its form checked.

    Raises:
        CorruptCheckpoint: there is none, or it is malformed.
    """
    manifest = _read_json(path / "manifest.json", _MANIFEST_BYTES)
    files, step, score = manifest.get("files"), manifest.get("step"), manifest.get("score")
    good = (
        manifest.get("format") == FORMAT
        and type(step) is int
        and 0 <= step < 10**8
        and (_NAME.fullmatch(path.name) is None or path.name == f"step-{step:08}")
        and (score is None or isinstance(score, int | float))
        and isinstance(files, dict)
        and "state.json" in files
        and all(_FILE.fullmatch(name) and name != "manifest.json" and _is_entry(entry) for name, entry in files.items())
    )
    if not good:
        raise CorruptCheckpoint(f"{path / 'manifest.json'} is not a checkpoint's manifest (format {FORMAT}).")
    return manifest


def _is_entry(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and type(entry.get("size")) is int
        and entry["size"] >= 0
        and isinstance(entry.get("sha256"), str)
    )


def _read_json(path: Path, max_bytes: int) -> dict[str, Any]:
    try:
        value = json.loads(read_regular(path, max_bytes=max_bytes))
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"{path} is not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise CorruptCheckpoint(f"{path} must hold a JSON object.")
    return value


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors = safetensors.torch.load_file(path)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise CorruptCheckpoint(f"{path} is not a safetensors file: {error}.") from error
    for name, tensor in tensors.items():
        if not path.name.startswith("rng-") and not bool(tensor.isfinite().all()):
            raise CorruptCheckpoint(f"{path}: {name} holds numbers that are not finite.")
    return tensors


def _write(path: Path, data: bytes) -> dict[str, Any]:
    """Write a file and describe it for the manifest."""
    write_durably(path, data)
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
