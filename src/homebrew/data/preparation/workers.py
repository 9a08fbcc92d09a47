"""Processes that encode the parts of `prepare`.

They are started as programs rather than forked: a fork of a process that uses a GPU or threads is not safe, and
`multiprocessing` would run the user's script again. Parts and counts are exchanged as lines of JSON. A worker ends when
its standard input is closed, so no worker survives if the main process is killed.
"""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, cast

import homebrew
from homebrew.data.preparation.documents import Span
from homebrew.data.preparation.encode_part import Counts, EncodeSettings, PartEncoder
from homebrew.data.preparation.plan import Part
from homebrew.errors import DataError, HomebrewError
from homebrew.io import strict_json

OnPart = Callable[[Part], None]
"""Called after each part. It may be called from another thread."""


@contextlib.contextmanager
def encoding(
    parts: Mapping[int, Part], settings: EncodeSettings, num_workers: int, on_part: OnPart
) -> Iterator[Iterator[Counts]]:
    """Yield an iterator over the counts of parts, which are encoded in the given order.

    Args:
        parts: Parts by their index.
        settings: How to encode them.
        num_workers: Number of processes. With 1, the parts are encoded in this process.
        on_part: Called after each part.
    """
    num_workers = min(num_workers, len(parts))
    if num_workers <= 1:
        yield _encode_here(parts, settings, on_part)
        return
    workers = [_Worker(settings) for _ in range(num_workers)]
    idle = queue.SimpleQueue[_Worker]()
    for worker in workers:
        idle.put(worker)

    def encode(index: int, part: Part) -> Counts:
        worker = idle.get()
        try:
            counts = worker.encode(index, part)
        finally:
            idle.put(worker)
        part.check_unchanged()
        on_part(part)
        return counts

    pool = ThreadPoolExecutor(num_workers)
    try:
        futures = [pool.submit(encode, index, part) for index, part in parts.items()]
        yield (future.result() for future in futures)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.kill()  # also ends the thread that waits for its reply
        pool.shutdown()
        for worker in workers:
            worker.close()


def _encode_here(parts: Mapping[int, Part], settings: EncodeSettings, on_part: OnPart) -> Iterator[Counts]:
    encoder = PartEncoder(settings)
    for index, part in parts.items():
        counts = encoder.encode(index, part.spans)
        part.check_unchanged()
        on_part(part)
        yield counts


class _Worker:
    """A process that encodes parts."""

    def __init__(self, settings: EncodeSettings) -> None:
        paths = [str(Path(homebrew.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        variables = {
            "PYTHONPATH": os.pathsep.join(paths),
            # Return freed memory to the system. pyarrow's own allocator keeps it, and so does glibc's for blocks below
            # a threshold, which grows to 32 MiB if it is not set.
            "ARROW_DEFAULT_MEMORY_POOL": "system",
            "MALLOC_MMAP_THRESHOLD_": "131072",
        }
        self._process = subprocess.Popen(  # noqa: S603 - this module
            [sys.executable, "-P", "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | variables,
            start_new_session=True,  # Ctrl-C reaches only the main process, which stops the workers
        )
        self._first_line = strict_json(asdict(settings)).encode() + b"\n"

    def encode(self, index: int, part: Part) -> Counts:
        """Encode a part and return its counts."""
        stdin, stdout = (cast("IO[bytes]", stream) for stream in (self._process.stdin, self._process.stdout))
        with contextlib.suppress(BrokenPipeError):  # the process has ended, so there is no reply
            stdin.write(self._first_line + strict_json({"index": index, "spans": part.spans}).encode() + b"\n")
            stdin.flush()
        self._first_line = b""
        line = stdout.readline()
        if not line:
            raise DataError(
                f"A process that encodes text ended with exit code {self._process.wait()}. If memory is short, use "
                f"fewer workers. The same command continues."
            )
        reply = json.loads(line)
        if "error" in reply:
            raise DataError(reply["error"])
        counts: Counts = reply
        return counts

    def kill(self) -> None:
        """Kill the process."""
        self._process.kill()

    def close(self) -> None:
        """Wait for the process, and close its pipes."""
        with contextlib.suppress(BrokenPipeError), self._process:
            pass


def _serve() -> None:
    """Encode the parts that are read from standard input, until it is closed."""
    lines = queue.SimpleQueue[Any]()

    def read() -> None:
        for line in os.fdopen(0, "rb", closefd=False):  # not sys.stdin, which Python closes at an exit
            lines.put(json.loads(line))
        os._exit(1)  # the main process has ended

    threading.Thread(target=read, daemon=True).start()
    encoder = PartEncoder(EncodeSettings(**lines.get()))
    while True:
        part = lines.get()
        try:
            reply: dict[str, Any] = encoder.encode(part["index"], [Span(*span) for span in part["spans"]])
        except HomebrewError as error:
            reply = {"error": str(error)}
        print(strict_json(reply), flush=True)


if __name__ == "__main__":
    _serve()
