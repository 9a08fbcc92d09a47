"""What the processes that write a checkpoint together tell the first one, which commits it.

Their writers are threads, where collectives would get between training's own. They meet in the launcher's store: it
is there before the first file is, takes an error's text when a disk is full, and leaves nothing in the folder.
"""

import json
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from homebrew import errors
from homebrew.checkpoint.manifest import Entry
from homebrew.checkpoint.verified_files import is_regular
from homebrew.distributed.collectives import connect
from homebrew.errors import CheckpointError, ConfigError, HomebrewError

_POLL_SECONDS = 0.05
_STORE_SECONDS = 30.0


class Reports:
    """The reports of one run's saves.

    Args:
        accelerator: of the run.
        timeout_seconds: how long the first process, once its own part is written, waits for the others'.

    Raises:
        ConfigError: the launcher has no store.
    """

    def __init__(self, accelerator: Accelerator, timeout_seconds: float) -> None:
        self._rank = accelerator.process_index
        self._others = range(1, accelerator.num_processes)
        self._timeout_seconds = timeout_seconds
        self._given_up = threading.Event()
        store = connect(_STORE_SECONDS)
        if store is None:
            raise ConfigError(
                "This run's checkpoints are larger than gather_limit_bytes, so all processes write them together, but "
                "the launcher has no store they could meet in. Start them by accelerate launch or torchrun, or raise "
                "gather_limit_bytes."
            )
        self._store = store

    @staticmethod
    def new_token() -> str:
        """A name for one save's reports: those of an earlier run or start are not taken for them."""
        return secrets.token_hex(8)

    def send(self, token: str, write: Callable[[], Mapping[str, Entry]]) -> None:
        """On another process than the first: write its part, and tell the first one what it was, or the error.

        Args:
            token: of the save, the same on all processes.
            write: writes the files and waits until they are on the disk.
        """
        report: dict[str, Any] = {"host": socket.gethostname()}
        try:
            report["files"] = {name: asdict(entry) for name, entry in write().items()}
        except BaseException as error:
            report |= {"error": type(error).__name__, "message": str(error)}
            raise
        finally:
            self._store.set(_key(token, self._rank), json.dumps(report))

    def collect(self, token: str, folder: Path) -> dict[str, Entry]:
        """On the first process: wait for the others, for all of them also where one has failed.

        Args:
            token: of the save.
            folder: where they write.

        Returns:
            Their files.

        Raises:
            CheckpointError: one has failed, has not reported in time, or has written elsewhere.
            NonFiniteError: a tensor of one holds a number that is not finite.
        """
        deadline = time.monotonic() + self._timeout_seconds
        entries: dict[str, Entry] = {}
        first_error: HomebrewError | None = None
        for rank in self._others:
            try:
                entries |= _entries(self._await(token, rank, folder, deadline), rank, folder)
            except HomebrewError as error:
                first_error = first_error or error
        if first_error is not None:  # not before: the folder is then cleared, and none may still write into it
            raise first_error
        return entries

    def give_up(self) -> None:
        """End any wait in `collect`: a process is lost."""
        self._given_up.set()

    def _await(self, token: str, rank: int, folder: Path, deadline: float) -> dict[str, Any]:
        """A process's report, once it is there; it is taken out of the store."""
        key = _key(token, rank)
        try:
            while not self._store.check([key]):
                late = time.monotonic() > deadline
                if late or self._given_up.wait(_POLL_SECONDS):
                    why = f"within {self._timeout_seconds:g} seconds of the first" if late else "when the run ended"
                    raise CheckpointError(
                        f"Process {rank} had not written its part of {folder} {why}. Start again with "
                        f"train(resume=True); if its disk is slow, raise collective_timeout_seconds."
                    )
            report: dict[str, Any] = json.loads(self._store.get(key))
            self._store.delete_key(key)
        except HomebrewError:
            raise
        except RuntimeError as error:  # the store has ended with the launcher
            raise CheckpointError(f"The launcher's store ended before {folder} was whole: {error}") from error
        return report


SHARE = (
    "Processes that write a checkpoint together need an output_dir on a file system that all share; or raise "
    "gather_limit_bytes, and process 0 writes alone."
)


def _entries(report: Mapping[str, Any], rank: int, folder: Path) -> dict[str, Entry]:
    """The files that a report tells of, once they are seen to be there; or the error it tells of, raised."""
    who = f"Process {rank} on {report['host']}"
    if "error" in report:
        kind = getattr(errors, report["error"], CheckpointError)
        kind = kind if issubclass(kind, HomebrewError) else CheckpointError
        raise kind(f"{who} could not write its part: {report['error']}: {report['message']}")
    entries = {name: Entry(**entry) for name, entry in report["files"].items()}
    for name, entry in entries.items():
        if not is_regular(folder / name, size=entry.size):
            raise CheckpointError(f"{who} has written {folder / name}, but it is not there for process 0. {SHARE}")
    return entries


def _key(token: str, rank: int) -> str:
    return f"homebrew/saved/{token}/{rank}"
