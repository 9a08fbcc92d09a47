"""Durable writes and bounded reads: the file-system operations under a checkpoint."""

import contextlib
import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from homebrew.errors import CheckpointError, CorruptCheckpoint

_CHUNK = 1 << 20


def write_durably(path: Path, data: bytes) -> None:
    """Write a new file and wait until it is on the disk; its mode follows the umask.

    Raises:
        CheckpointError: it could not be written whole, on a full disk for one.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            view, written = memoryview(data), 0
            while written < len(view):
                written += os.write(descriptor, view[written : written + _CHUNK])
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "Free some space." if full else "Look at the folder and its permissions."
        raise CheckpointError(
            f"{path} ({len(data):,} bytes) could not be written: {error.strerror}. {advice}"
        ) from error


def sync_folder(path: Path) -> None:
    """Wait until a folder's entries are on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename(path: Path, new: Path) -> None:
    """Rename within a folder, at once."""
    path.rename(new)


def remove_folder(path: Path) -> None:
    """Remove a folder and what is in it; one that is gone is no error."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(path)


def read_regular(path: Path, *, max_bytes: int) -> bytes:
    """A file's bytes, without following links or waiting on pipes.

    Args:
        path: the file.
        max_bytes: more are an error, found before they are read.

    Raises:
        CorruptCheckpoint: there is no such regular file, or it is larger.
    """
    with _opened(path) as descriptor:
        size = os.fstat(descriptor).st_size
        if size > max_bytes:
            raise CorruptCheckpoint(f"{path} has {size:,} bytes; at most {max_bytes:,} are expected.")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read(size + 1)


def hash_regular(path: Path, *, size: int) -> str:
    """SHA-256 of a file that must have `size` bytes.

    Raises:
        CorruptCheckpoint: there is no such regular file, or it has another size.
    """
    with _opened(path) as descriptor:
        found = os.fstat(descriptor).st_size
        if found != size:
            raise CorruptCheckpoint(f"{path} has {found:,} bytes; its manifest says {size:,}.")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise CorruptCheckpoint(f"{path} cannot be opened: {error.strerror}.") from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise CorruptCheckpoint(f"{path} is not a regular file.")
        yield descriptor
    finally:
        os.close(descriptor)
