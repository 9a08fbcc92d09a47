"""The commit protocol of checkpoints on disk: a checkpoint is complete, or it does not exist.

A save writes into a folder with a temporary name, syncs each file, writes the manifest last, renames the folder, syncs
the rename, and only then removes old checkpoints. A load uses a folder only if every file in it matches its manifest.

When a step is saved a second time, its first checkpoint is moved aside until the second is complete; a load still
finds it there.
"""

import contextlib
import errno
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from homebrew.checkpoint.checkpoint_files import TensorFiles, write_checkpoint
from homebrew.checkpoint.manifest import FOLDER, Checkpoint, matches_listing, open_checkpoint, read_manifest
from homebrew.checkpoint.run_folder import not_writable
from homebrew.checkpoint.verified_files import Entry
from homebrew.errors import CheckpointError, ConfigError, CorruptCheckpoint
from homebrew.io import fsync_directory, is_disk_full, make_directory, remove_tree
from homebrew.user_warnings import warn

_TEMPORARY = re.compile(r"\.(step-\d{8})\.(writing|removing|aside)", re.ASCII)


class CheckpointStore:
    """The checkpoints of one run, in `<output_dir>/checkpoints`.

    A checkpoint counts as kept only if this process wrote it or has verified its hashes. Corrupt checkpoints do not
    count and are not removed.

    Args:
        output_dir: The run's folder.
        keep_last: Number of checkpoints to keep, counted back from the one just saved. Newer ones are never removed.
        keep_every: Also keep every checkpoint whose step is a multiple of this.
        keep_before: Also keep the newest checkpoint up to this step.
    """

    def __init__(
        self,
        output_dir: str | Path,
        *,
        keep_last: int = 2,
        keep_every: int | None = None,
        keep_before: int | None = None,
    ) -> None:
        self.folder = Path(output_dir) / "checkpoints"
        self._keep_last = keep_last
        self._keep_every = keep_every
        self._keep_before = keep_before
        self._valid: dict[int, bool] = {}

    def prepare(self) -> None:
        """Create the folder, and clean it with `roll_back`; raise ConfigError if it cannot be written to."""
        try:
            make_directory(self.folder)
            if not os.access(self.folder, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, "permission denied")
            self.roll_back()
        except OSError as error:
            raise not_writable(self.folder.parent, str(error.strerror)) from error

    def check_is_empty(self) -> None:
        """Raise ConfigError if there are checkpoints: a new run must not be mixed with an earlier one."""
        if self.steps():
            raise ConfigError(
                f"output_dir={str(self.folder.parent)!r} already holds a run. Resume it with train(resume=True) or "
                f"`homebrew train --resume`, move it aside and start over with train(overwrite=True) or --overwrite, "
                f"or choose another output_dir."
            )

    def path(self, step: int) -> Path:
        """Return the folder of a step's checkpoint, whether or not it exists."""
        return self.folder / f"step-{step:08}"

    def temporary_path(self, step: int) -> Path:
        """Return the folder that a step's checkpoint is written to before it is committed."""
        return self.folder / f".{self.path(step).name}.writing"

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, valid or not, in ascending order."""
        return sorted(self._folders())

    def _folders(self) -> dict[int, list[Path]]:
        """Return the checkpoint folders of each step. If a step has two, the newer comes first."""
        folders: dict[int, list[Path]] = {}
        try:
            paths = sorted(self.folder.iterdir(), reverse=True)
        except (FileNotFoundError, NotADirectoryError):
            return folders
        except OSError as error:
            raise CheckpointError(
                f"{self.folder} cannot be listed: {error.strerror}. Check the folder and its permissions."
            ) from error
        for path in paths:
            temporary = _TEMPORARY.fullmatch(path.name)
            if match := FOLDER.fullmatch(temporary[1] if temporary and temporary[2] == "aside" else path.name):
                folders.setdefault(int(match[1]), []).append(path)
        return folders

    def save(self, step: int, files: TensorFiles, state: Mapping[str, Any], *, score: float | None = None) -> Path:
        """Write a checkpoint, and remove those that are no longer kept: `begin` and `commit` in one call.

        The checkpoint with the lowest score is kept; NaN and infinity count as None.

        Returns:
            The checkpoint's folder.

        Raises:
            CheckpointError: The checkpoint could not be written; earlier checkpoints are unchanged.
        """
        self.begin(step)
        return self.commit(step, files, state, score=score)

    def begin(self, step: int) -> None:
        """Create the temporary folder of a step, after removing what an interrupted save has left."""
        if not FOLDER.fullmatch(self.path(step).name):
            raise CheckpointError(f"step={step} cannot be saved: it must be from 0 to 99,999,999.")
        with self._roll_back_on_error(step, 0):
            make_directory(self.folder)
            self.roll_back()
            self.temporary_path(step).mkdir()

    def commit(
        self,
        step: int,
        files: TensorFiles,
        state: Mapping[str, Any],
        *,
        score: float | None = None,
        shards: Mapping[str, Entry] | None = None,
    ) -> Path:
        """Complete the checkpoint that `begin` has started, and remove those that are no longer kept, like `save`.

        `shards` are files that ranks have already written to subfolders of the temporary folder.
        """
        score = None if score is None or not math.isfinite(score) else float(score)
        path, temporary = self.path(step), self.temporary_path(step)
        aside = self.folder / f".{path.name}.aside"
        num_bytes = sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())
        with self._roll_back_on_error(step, num_bytes):
            write_checkpoint(temporary, step, files, state, score, shards or {})
            if os.path.lexists(path):
                path.rename(aside)
            temporary.rename(path)
            fsync_directory(self.folder)
        self._valid[step] = True
        _remove(aside)
        self.prune(step)
        return path

    def roll_back(self) -> None:
        """Remove what interrupted saves and removals have left, and restore a checkpoint that was moved aside."""
        leftovers = [path for path in self.folder.iterdir() if _TEMPORARY.fullmatch(path.name)]
        if leftovers:
            fsync_directory(self.folder)  # a checkpoint set aside is removed only once its successor's name is on disk
        for path in leftovers:
            _, name, kind = path.name.split(".")
            if kind == "aside" and not os.path.lexists(self.folder / name):
                path.rename(self.folder / name)
            else:
                _remove(path)

    @contextlib.contextmanager
    def _roll_back_on_error(self, step: int, num_bytes: int) -> Iterator[None]:
        """Undo a failed save, and turn an OSError into a CheckpointError that says what to do."""
        try:
            yield
        except BaseException as error:
            with contextlib.suppress(OSError):  # the first error is the one to raise
                self.roll_back()
            if isinstance(error, OSError):
                raise CheckpointError(
                    f"{error.filename or self.path(step)} could not be written: {error.strerror}. "
                    + (
                        f"Free disk space: the checkpoint needs {num_bytes:,} bytes."
                        if is_disk_full(error)
                        else "Check the folder."
                    )
                ) from error
            raise

    def latest(self) -> tuple[Checkpoint | None, list[str]]:
        """Return the newest valid checkpoint, or None, and the reason for each newer, invalid one.

        The run may be in progress. If it removes a checkpoint after the folder was listed, that checkpoint does not
        count as invalid: the folder is listed again.
        """
        folders = self._folders()
        while True:
            checkpoint, reasons = self._newest_valid(folders)
            if not reasons or (current := self._folders()) == folders:
                return checkpoint, reasons
            folders = current

    def _newest_valid(self, folders: Mapping[int, Sequence[Path]]) -> tuple[Checkpoint | None, list[str]]:
        reasons: list[str] = []
        for step, paths in sorted(folders.items(), reverse=True):
            for path in paths:
                try:
                    if path.is_symlink():
                        raise CorruptCheckpoint(f"{path} is a symbolic link; to use it, resume from its target.")
                    checkpoint = open_checkpoint(path)
                except CorruptCheckpoint as error:
                    reasons.append(str(error))
                else:
                    self._valid[step] = True
                    return checkpoint, reasons
        return None, reasons

    def prune(self, newest: int) -> None:
        """Remove valid checkpoints up to `newest` that are neither recent, nor at a kept step, nor the best."""
        scores: dict[int, float | None] = {}
        for step in self.steps():
            path = self.path(step)
            with contextlib.suppress(CorruptCheckpoint, OSError):  # invalid checkpoints are left alone
                if step <= newest and not path.is_symlink() and matches_listing(path, manifest := read_manifest(path)):
                    scores[step] = manifest.score
        if len(scores) <= self._keep_last:
            return  # without verifying them, which takes time
        kept = {step for step in scores if self._keep_every and step % self._keep_every == 0}
        newest_first = sorted(scores, reverse=True)
        kept |= self._first_valid(newest_first, self._keep_last)
        if self._keep_before is not None:
            kept |= self._first_valid([step for step in newest_first if step <= self._keep_before], 1)
        scored = [(score, step) for step, score in scores.items() if score is not None]
        kept |= self._first_valid([step for _, step in sorted(scored)], 1)
        for step in scores.keys() - kept:
            if self._valid.get(step, True):
                _remove(self.path(step), rename_to=self.folder / f".{self.path(step).name}.removing")
                self._valid.pop(step, None)

    def _first_valid(self, steps: Iterable[int], count: int) -> set[int]:
        return set(islice(filter(self._is_valid, steps), count))

    def _is_valid(self, step: int) -> bool:
        """Return whether a step's checkpoint is valid; each is verified once per process."""
        if step not in self._valid:
            try:
                open_checkpoint(self.path(step))
                self._valid[step] = True
            except CorruptCheckpoint:
                self._valid[step] = False
        return self._valid[step]


def _remove(path: Path, rename_to: Path | None = None) -> None:
    """Remove a folder; on failure warn, and leave it to the next save.

    It is first renamed to `rename_to`, so that a load does not look at the half-removed folder.
    """
    try:
        if rename_to is not None:
            path.rename(rename_to)
            fsync_directory(path.parent)  # otherwise a power failure may undo the rename but not the removals
        remove_tree(rename_to or path)
    except OSError as error:
        warn(f"{path} could not be removed: {error.strerror}.")
