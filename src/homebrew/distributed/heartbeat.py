"""Which process is missing when the processes can no longer talk to each other."""

import socket
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from accelerate import Accelerator

from homebrew.distributed.collectives import connect, is_lost
from homebrew.errors import TrainingError

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

INTERVAL_SECONDS = 1.0
"""Between two beats."""
PATIENCE_SECONDS = 3.0
"""A process without a beat for as long has ended, or hangs."""


class Heartbeat:
    """While it is entered, tells the others that this process lives; names those that do not when a collective fails.

    The beats are counts in the launcher's store. A collective's own error names an address or nothing at all, and a
    process that was killed or stopped cannot say so itself.

    Args:
        accelerator: of the run.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._rank = accelerator.process_index
        self._num_processes = accelerator.num_processes
        self._store: TCPStore | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        if self._num_processes > 1 and (store := connect(PATIENCE_SECONDS)) is not None:
            self._store = store
            store.set(self._key("host", self._rank), socket.gethostname())
            store.delete_key(self._key("left", self._rank))  # of an earlier start
            store.add(self._key("beats", self._rank), 1)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        missing = None
        if is_lost(error):
            missing = self._missing()
        self._ended.set()
        if self._thread.is_alive():  # in the store while Python ends, it would take the process down by SIGABRT
            self._thread.join(PATIENCE_SECONDS)
        if missing is not None:
            raise TrainingError(_message(missing, self._num_processes)) from error

    def _beat(self) -> None:
        while self._store is not None and not self._ended.wait(INTERVAL_SECONDS):
            try:
                self._store.add(self._key("beats", self._rank), 1)
            except RuntimeError:  # the store ended with its launcher
                return

    def _missing(self) -> list[str] | None:
        """The processes without a beat, or None where that cannot be known."""
        if self._store is None:
            return None
        others = [rank for rank in range(self._num_processes) if rank != self._rank]
        try:
            self._store.set(self._key("left", self._rank), "")  # because of another: not what others look for
            before = {rank: self._store.add(self._key("beats", rank), 0) for rank in others}
            time.sleep(PATIENCE_SECONDS)
            silent = [
                rank
                for rank in others
                if self._store.add(self._key("beats", rank), 0) == before[rank]
                and not self._store.check([self._key("left", rank)])
            ]
            return [f"{rank} on {self._store.get(self._key('host', rank)).decode()}" for rank in silent]
        except RuntimeError:  # the store ended with its launcher
            return None

    @staticmethod
    def _key(fact: str, rank: int) -> str:
        return f"homebrew/{fact}/{rank}"


def _message(missing: list[str], num_processes: int) -> str:
    if missing:
        return (
            f"Of {num_processes} processes no longer there, or stuck: {', '.join(missing)}. If it had an error of its "
            f"own, that stands above or in that machine's log. Start all again with train(resume=True)."
        )
    return (
        f"A message between the {num_processes} processes failed or timed out, though all of them are there: one may "
        f"have been slower than collective_timeout_seconds, or the network broke. Start all again with "
        f"train(resume=True)."
    )
