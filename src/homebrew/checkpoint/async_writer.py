"""Work that a run does not wait for."""

import threading
from collections.abc import Callable


class AsyncWriter:
    """Writes one thing at a time, in a thread; what that failed with is kept until it is asked for."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, write: Callable[[], object], *, name: str) -> None:
        """Call `write`, once the last one has ended.

        Args:
            write: what to do.
            name: the thread's.

        Raises:
            BaseException: what the last one failed with.
        """
        self.wait()

        def work() -> None:
            try:
                write()
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=work, name=name)
        self._thread.start()

    def is_writing(self, seconds: float | None) -> bool:
        """Whether something is still being written after so many seconds; None: wait for its end."""
        if self._thread is not None:
            self._thread.join(seconds)
            if not self._thread.is_alive():
                self._thread = None
        return self._thread is not None

    @property
    def failed(self) -> bool:
        """Whether there is an error that nobody has asked for."""
        return self._error is not None

    def take_error(self) -> BaseException | None:
        """The error, once."""
        error, self._error = self._error, None
        return error

    def close(self) -> None:
        """Wait for the end, whatever becomes of it."""
        self.is_writing(None)

    def wait(self) -> None:
        """Wait for the end, and raise what it failed with."""
        self.close()
        if (error := self.take_error()) is not None:
            raise error
