"""`BackgroundStream`: a text stream whose writer never waits for the reader."""

import contextlib
import io
import os
import threading
from pathlib import Path
from queue import SimpleQueue
from typing import IO

MAX_PENDING = 1000
"""Maximum number of texts that wait for the reader; further ones are dropped."""

PATIENCE_SECONDS = 2.0
"""Time without any progress after which `BackgroundStream.close` gives up."""


class BackgroundStream:
    """Text stream that writes in a background thread, so that a slow or stopped reader does not stop the program.

    Examples are `| sleep 1000`, a pager, and a terminal stopped by Ctrl-S. While nobody reads, text is dropped. Text
    that cannot be written, because the pipe or terminal is closed or the disk is full, is dropped, too.

    The thread is a daemon and holds no lock while it waits, so the process can exit at any time.

    Args:
        stream: Stream to write to.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._pending: SimpleQueue[str | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="display", daemon=True)
        self._thread.start()

    @property
    def encoding(self) -> str:
        """The stream's encoding."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        """Return whether the stream is a terminal."""
        return hasattr(self._stream, "isatty") and self._stream.isatty()

    def write(self, text: str) -> int:
        """Write text soon, or drop it if too much text is waiting."""
        if not self._thread.is_alive():  # closed, or in a forked process such as a loader's worker
            self._write(text)
        elif self._pending.qsize() < MAX_PENDING:
            self._pending.put(text)
        return len(text)

    def flush(self) -> None:
        """Do nothing: the thread flushes."""

    def close(self) -> None:
        """Wait until all text is written, unless nobody reads; the stream itself stays open."""
        self._pending.put(None)
        num_pending = -1
        while self._thread.is_alive() and num_pending != self._pending.qsize():
            num_pending = self._pending.qsize()
            self._thread.join(PATIENCE_SECONDS)

    def _run(self) -> None:
        for text in iter(self._pending.get, None):
            self._write(text)

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # ValueError: the stream has been closed
            self._stream.flush()  # what others have printed to it comes first
            descriptor = _descriptor(self._stream)
            if descriptor is None:
                self._stream.write(text)
                self._stream.flush()
            else:
                _write_bytes(descriptor, text.encode(self.encoding, errors="replace"))


def _descriptor(stream: IO[str]) -> int | None:
    """Return the file descriptor of a stream, or None for a notebook's, a test's or a custom one."""
    if isinstance(stream, io.TextIOWrapper):
        with contextlib.suppress(io.UnsupportedOperation):
            return stream.fileno()
    return None


def _write_bytes(descriptor: int, data: bytes) -> None:
    """Write to a descriptor. Its stream would hold a lock meanwhile, for which Python waits at exit."""
    try:
        while data:
            data = data[os.write(descriptor, data) :]
    except BrokenPipeError:  # the reader has exited, as `head` does; later prints must not fail
        with Path(os.devnull).open("wb") as devnull:
            os.dup2(devnull.fileno(), descriptor)
