"""Runs one write at a time in a background thread and keeps its error."""

import threading
from collections.abc import Callable


class AsyncWriter:
    """Runs one write at a time in a background thread.

    An error of the thread is kept until `wait`, `start` or `take_error` returns or raises it.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, write: Callable[[], object], *, name: str) -> None:
        """Call `write` in a thread of this name, after the previous write has finished.

        If that has failed, its error is raised and `write` is not called.
        """
        self.wait()

        def run() -> None:
            try:
                write()
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=run, name=name)
        self._thread.start()

    def is_writing(self, timeout_seconds: float | None) -> bool:
        """Return whether a write is still running after `timeout_seconds`; None waits until it has finished."""
        if self._thread is not None:
            self._thread.join(timeout_seconds)
            if not self._thread.is_alive():
                self._thread = None
        return self._thread is not None

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
