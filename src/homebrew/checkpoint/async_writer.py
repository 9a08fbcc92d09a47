"""Runs one write at a time in a background thread and keeps its error."""

import threading
from collections.abc import Callable


class AsyncWriter:
    """Runs one write at a time in a background thread.

    The error of a failed write is kept until `wait` or `start` raises it, or `take_error` returns it.

    A KeyboardInterrupt may end any method early: the write still runs, and the next call waits for it. This is why
    methods neither join the thread nor wait for an event. An interrupted `Thread.join` marks a live thread as ended,
    and an interrupted `Event.wait` may keep the event's lock.
    """

    def __init__(self) -> None:
        self._running = False
        self._ended = threading.Lock()  # held while a write is running
        self._error: BaseException | None = None

    def start(self, write: Callable[[], object], *, name: str) -> None:
        """Call `write` in a thread of this name, after the previous write has finished.

        If the previous write has failed, its error is raised and `write` is not called.
        """
        self.wait()
        claimed, ended = threading.Lock(), threading.Lock()
        ended.acquire()

        def run() -> None:
            if not claimed.acquire(blocking=False):
                return
            try:
                write()
            except BaseException as error:
                self._error = error
            self._running = False
            ended.release()

        self._ended, self._running = ended, True
        try:
            threading.Thread(target=run, name=name).start()
        except BaseException:  # too many threads, or an interrupt
            if claimed.acquire(blocking=False):  # otherwise the thread is writing already
                self._running = False
            raise

    def is_writing(self, timeout_seconds: float | None) -> bool:
        """Return whether a write is still running after `timeout_seconds`; None waits until it has finished."""
        if self._running and self._ended.acquire(timeout=-1 if timeout_seconds is None else timeout_seconds):
            self._ended.release()
        return self._running

    @property
    def failed(self) -> bool:
        """Whether a write has failed and its error has not been raised yet."""
        return self._error is not None

    def take_error(self) -> BaseException | None:
        """Return the error of the last write and clear it."""
        error, self._error = self._error, None
        return error

    def close(self) -> None:
        """Wait for the running write, without raising its error."""
        self.is_writing(None)

    def wait(self) -> None:
        """Wait for the running write, and raise its error."""
        self.close()
        if (error := self.take_error()) is not None:
            raise error
