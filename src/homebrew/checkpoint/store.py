"""The commit protocol: a checkpoint is there whole, or not at all.

A save writes into a folder of a temporary name, waits for each file to be on the disk, writes the manifest last,
renames the folder, waits for the rename, and only then removes what is no longer kept. A load uses a folder only
once every file in it is the one its manifest describes.

While a step is saved a second time, its first checkpoint stands aside, where a load still finds it.
"""

import contextlib
import math
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from homebrew.checkpoint.checkpoint_files import Files, Others, write_checkpoint
from homebrew.checkpoint.manifest import FOLDER, Checkpoint, has_its_files, open_checkpoint, read_manifest
from homebrew.checkpoint.verified_files import make_folder, remove_folder, rename, unwritable
from homebrew.errors import CheckpointError, ConfigError, CorruptCheckpoint
from homebrew.io import fsync_directory

_LEFT = re.compile(r"\.(step-\d{8})\.(writing|removing|aside)", re.ASCII)


class CheckpointStore:
    """The checkpoints of a run, in `<output_dir>/checkpoints`.

    Of each checkpoint that counts as kept the files' hashes have been seen to be right, by this process and once:
    while it wrote them, or else before it first counts. Damaged checkpoints do not count and are not removed.

    Args:
        output_dir: the run's folder.
        keep_last: newest checkpoints that are kept, up to the one last saved; newer ones are not touched.
        keep_every: those at multiples of this step are kept for good.
    """

    def __init__(self, output_dir: str | Path, *, keep_last: int = 2, keep_every: int | None = None) -> None:
        self.folder = Path(output_dir) / "checkpoints"
        self._keep_last = keep_last
        self._keep_every = keep_every
        self._verified: dict[int, bool] = {}

    def prepare(self) -> None:
        """Make the folder.

        Raises:
            ConfigError: it cannot be made or written to.
        """
        reason = "you may not write there"
        try:
            make_folder(self.folder)
            writable = os.access(self.folder, os.W_OK | os.X_OK)
        except OSError as error:
            writable, reason = False, str(error.strerror)
        if not writable:
            raise ConfigError(
                f"output_dir={str(self.folder.parent)!r} cannot be written to: {reason}. Choose another folder."
            )

    def path(self, step: int) -> Path:
        """The folder of a step's checkpoint, whether it exists or not."""
        return self.folder / f"step-{step:08}"

    def temporary(self, step: int) -> Path:
        """The folder that a step's checkpoint is written in."""
        return self.folder / f".{self.path(step).name}.writing"

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, whole or not, in order."""
        return sorted(self._folders())

    def _folders(self) -> dict[int, list[Path]]:
        """Where each step's checkpoint is, the newer of two first."""
        found: dict[int, list[Path]] = {}
        for path in sorted(self.folder.iterdir(), reverse=True) if self.folder.is_dir() else ():
            left = _LEFT.fullmatch(path.name)
            if match := FOLDER.fullmatch(left[1] if left and left[2] == "aside" else path.name):
                found.setdefault(int(match[1]), []).append(path)
        return found

    def start(self, step: int) -> None:
        """Make the folder that a step's checkpoint is written in, after clearing what a killed save has left.

        Raises:
            CheckpointError: it could not be made.
        """
        if not FOLDER.fullmatch(self.path(step).name):
            raise CheckpointError(f"step={step} cannot be saved: it must be from 0 to 99,999,999.")
        with self._undone_on_error(step, {}):
            make_folder(self.folder)
            self._clean()
            self.temporary(step).mkdir()

    def cancel(self, step: int) -> None:
        """Remove what `start` has made."""
        _discard(self.temporary(step))

    def save(
        self,
        step: int,
        files: Files,
        state: Mapping[str, Any],
        *,
        score: float | None = None,
        others: Others | None = None,
    ) -> Path:
        """Write a checkpoint, and remove those no longer kept.

        Args:
            step: optimizer steps taken.
            files: CPU tensors.
            state: JSON.
            score: the evaluation loss; the lowest of those kept is kept. One that is not finite is none.
            others: what other processes write into the folder, which `start` has then been called for.

        Returns:
            Its folder.

        Raises:
            CheckpointError: it could not be written; what was there before still is, and nothing else.
            NonFiniteError: a tensor holds a number that is not finite; the same holds.
        """
        score = None if score is None or not math.isfinite(score) else float(score)
        path, temporary = self.path(step), self.temporary(step)
        aside = self.folder / f".{path.name}.aside"
        if others is None:
            self.start(step)
        with self._undone_on_error(step, files):
            write_checkpoint(temporary, step, files, state, score, others)
            if os.path.lexists(path):
                rename(path, aside)
            rename(temporary, path)
            fsync_directory(self.folder)
        self._verified[step] = True
        _discard(aside)
        self._prune(step)
        return path

    @contextlib.contextmanager
    def _undone_on_error(self, step: int, files: Files) -> Iterator[None]:
        """Clear what a save that fails leaves, and have its error say what could not be written."""
        try:
            yield
        except BaseException as error:
            with contextlib.suppress(OSError):  # the error is the one to tell of
                self._clean()
            if isinstance(error, OSError):
                num_bytes = sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())
                raise unwritable(self.path(step), num_bytes, error) from error
            raise

    def latest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint that is whole.

        Returns:
            It, or None where there is none; and why newer ones were passed over.
        """
        passed_over: list[str] = []
        for step, paths in sorted(self._folders().items(), reverse=True):
            for path in paths:
                try:
                    if path.is_symlink():
                        raise CorruptCheckpoint(f"{path} is a link; name the folder it leads to, to use that.")
                    checkpoint = self.open(path)
                except CorruptCheckpoint as error:
                    passed_over.append(str(error))
                else:
                    self._verified[step] = True
                    return checkpoint, passed_over
        return None, passed_over

    def open(self, path: str | Path) -> Checkpoint:
        """Verify a checkpoint, wherever it is.

        Raises:
            CorruptCheckpoint: it is not whole.
        """
        return open_checkpoint(Path(path))

    def _clean(self) -> None:
        """Remove what a killed save or prune has left, and put back what one has moved aside."""
        left = [path for path in self.folder.iterdir() if _LEFT.fullmatch(path.name)]
        if left:
            fsync_directory(self.folder)  # a checkpoint aside goes only once its successor is there to stay
        for path in left:
            _, name, kind = path.name.split(".")
            if kind == "aside" and not os.path.lexists(self.folder / name):
                rename(path, self.folder / name)
            else:
                _discard(path)

    def _prune(self, newest: int) -> None:
        """Remove whole checkpoints up to `newest` that are neither recent, nor at a kept step, nor the best."""
        scores: dict[int, float | None] = {}
        for step in self.steps():
            path = self.path(step)
            with contextlib.suppress(CorruptCheckpoint, OSError):  # not ours to judge, nor to count
                if step <= newest and not path.is_symlink() and has_its_files(path, manifest := read_manifest(path)):
                    scores[step] = manifest.score
        kept = {step for step in scores if self._keep_every and step % self._keep_every == 0}
        kept |= self._first_whole(sorted(scores, reverse=True), self._keep_last)
        scored = [(score, step) for step, score in scores.items() if score is not None]
        kept |= self._first_whole([step for _, step in sorted(scored)], 1)
        for step in scores.keys() - kept:
            if self._verified.get(step, True):
                _discard(self.path(step), self.folder / f".{self.path(step).name}.removing")
                self._verified.pop(step, None)

    def _first_whole(self, steps: Iterable[int], count: int) -> set[int]:
        return set(islice(filter(self._is_whole, steps), count))

    def _is_whole(self, step: int) -> bool:
        """Whether the hashes of a step's files are right, or were when this process last saw them."""
        if step not in self._verified:
            try:
                self.open(self.path(step))
                self._verified[step] = True
            except CorruptCheckpoint:
                self._verified[step] = False
        return self._verified[step]


def _discard(path: Path, moved: Path | None = None) -> None:
    """Remove a folder, after renaming it if a load would look at it half gone.

    What cannot be removed now is left for the next save to try again.
    """
    try:
        if moved is not None:
            rename(path, moved)
            fsync_directory(path.parent)  # else its files may be gone from the disk, and its name still there
        remove_folder(moved or path)
    except OSError as error:
        warnings.warn(f"{path} could not be removed: {error.strerror}.", stacklevel=2)
