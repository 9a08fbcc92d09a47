"""The folder in which `prepare` keeps encoded parts until the token files are complete.

If a run is killed, the folder remains, and the same command continues from it. The folder has the encoded parts, and
`plan.json` with the options of the run and a hash of each part's input.
"""

import contextlib
import fcntl
import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from homebrew.bounded_readers import read_json
from homebrew.data.preparation.encode_part import PartFiles
from homebrew.errors import DataError
from homebrew.io import atomic_replace, make_directory, remove_leftovers, strict_json, write_errors

_PART_FILE = re.compile(r"\.?(\d{6,})\.(?:json|train|val)(?:\.[0-9a-f]{8})?")
"""Name of a part's file, or of a temporary file that `atomic_replace` makes for it."""


@dataclass(frozen=True)
class RunPlan:
    """Everything that the token files of a run depend on."""

    options: Mapping[str, object]
    digests: Sequence[str]
    """Hash of each part's input."""


class PrepareState:
    """The folder of one run.

    Args:
        output: Path of the token file to prepare.
    """

    def __init__(self, output: Path) -> None:
        self.folder = output.with_suffix(".partial")
        self._plan = self.folder / "plan.json"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Create the folder, and lock it during the block. At the end, remove it unless it has a complete part.

        Raises:
            DataError: If another process uses the folder, it cannot be created, or the block raises an `OSError`.
        """
        with output_errors(self.folder):
            make_directory(self.folder)
            descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                _lock(descriptor, self.folder)
                try:
                    yield
                finally:
                    self._remove_if_empty()
            finally:
                os.close(descriptor)

    def part(self, index: int) -> PartFiles:
        """Return the files of a part."""
        return PartFiles(self.folder, index)

    def num_unchanged(self, plan: RunPlan) -> int:
        """Compare an earlier run that was not completed with the plan of this one.

        Returns:
            The number of parts at the start that can be used again. It is the number of all parts only if nothing has
            changed.

        Raises:
            DataError: If the earlier run has other options.
        """
        if not self._plan.exists():
            return 0
        earlier = read_json(self._plan, DataError)
        for name, value in plan.options.items():
            if (before := earlier["options"].get(name)) != value:
                raise DataError(
                    f"{self.folder} is from a run that was not completed, with {name}={before!r:.100} instead of "
                    f"{value!r:.100}. Use the same options to continue it, or delete that folder to start over."
                )
        if earlier["parts"] == plan.digests:
            return len(plan.digests)
        pairs = zip(earlier["parts"], plan.digests, strict=False)
        equal = itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)
        return min(len(list(equal)), len(plan.digests) - 1)  # if later parts were dropped, the last shard changes

    def has_shards(self) -> bool:
        """Return whether the shards that exist belong to this run, and not to an earlier one that was completed."""
        return self._plan.exists() and bool(read_json(self._plan, DataError)["has_shards"])

    def write_plan(self, plan: RunPlan, *, has_shards: bool) -> None:
        """Write the plan of this run. The method `has_shards` will return the argument of this name."""
        content = {"options": plan.options, "parts": plan.digests, "has_shards": has_shards}
        with atomic_replace(self._plan) as temporary:
            temporary.write_text(strict_json(content), encoding="utf-8")

    def remove_parts(self, first: int = 0) -> None:
        """Remove the parts from `first` on, and the temporary files of killed runs."""
        for file in self.folder.iterdir():
            match = _PART_FILE.fullmatch(file.name)
            if match and (int(match[1]) >= first or file.name.startswith(".")):
                file.unlink()

    def _remove_if_empty(self) -> None:
        """Remove the folder if it has no complete part."""
        if not any(file.suffix == ".json" and _PART_FILE.fullmatch(file.name) for file in self.folder.iterdir()):
            self.remove_parts()
            remove_leftovers(self._plan)
            self._plan.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # it has other files
                self.folder.rmdir()


def output_errors(path: Path) -> AbstractContextManager[None]:
    """Convert an `OSError` to a `DataError` that names the error's file, or `path`."""
    remedy = "Check the path, its permissions and the free disk space; the same command continues."
    return write_errors(path, DataError, remedy)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_locked = True
    except BlockingIOError:
        is_locked = False
    except OSError:
        is_locked = True  # the file system has no locks
    # Since this process opened the folder, another one may have ended and removed it.
    if not is_locked or not folder.exists() or not os.path.samestat(os.fstat(descriptor), folder.stat()):
        raise DataError(
            f"{folder} is in use by another process, which prepares the same output. Wait until it has ended, or "
            f"choose another output."
        )
