"""Reads files that may be corrupt or hostile: bounded in size, verified by hash, without following links.

All functions but `is_regular` raise CorruptCheckpoint if the path is not a regular file or not the expected one.
"""

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from homebrew.errors import CorruptCheckpoint

_CHUNK_BYTES = 1 << 24


def is_regular(path: Path, *, size: int) -> bool:
    """Return whether `path` is a regular file, not a symbolic link, of `size` bytes."""
    try:
        status = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size == size


def read_bounded(path: Path, *, max_bytes: int) -> bytes:
    """Read a file of at most `max_bytes`."""
    with _open_regular(path) as (file, size):
        if size > max_bytes:
            raise CorruptCheckpoint(f"{path} has {size:,} bytes; at most {max_bytes:,} are expected.")
        return file.read(size)


def read_verified(path: Path, *, size: int, sha256: str) -> bytes:
    """Read a file and check its size and hash; the returned bytes are the ones that were hashed."""
    with _open_regular(path) as (file, actual_size):
        _check_size(path, actual_size, size)
        data = file.read(size)
    _check_hash(path, hashlib.sha256(data).hexdigest(), sha256)
    return data


def verify(path: Path, *, size: int, sha256: str) -> None:
    """Check a file's size and hash without loading it into memory."""
    with _open_regular(path) as (file, actual_size):
        _check_size(path, actual_size, size)
        _check_hash(path, _hash(file, size), sha256)


def measure(path: Path) -> tuple[int, str]:
    """Return a file's size in bytes and its SHA-256 in hexadecimal."""
    with _open_regular(path) as (file, size):
        return size, _hash(file, size)


def _hash(file: BinaryIO, size: int) -> str:
    digest = hashlib.sha256()
    for start in range(0, size, _CHUNK_BYTES):  # at most `size` bytes, even if the file is growing
        digest.update(file.read(min(_CHUNK_BYTES, size - start)))
    return digest.hexdigest()


@contextlib.contextmanager
def _open_regular(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """Open a regular file, and yield it with its size in bytes. Never follows links or blocks on pipes."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise CorruptCheckpoint(f"{path} cannot be opened: {getattr(error, 'strerror', error)}.") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise CorruptCheckpoint(f"{path} is not a regular file.")
        with open(descriptor, "rb", closefd=False) as file:
            yield file, status.st_size
    except OSError as error:
        raise CorruptCheckpoint(f"{path} cannot be read: {error.strerror}.") from error
    finally:
        os.close(descriptor)


def _check_size(path: Path, actual: int, expected: int) -> None:
    if actual != expected:
        raise CorruptCheckpoint(f"{path} has {actual:,} bytes; its manifest says {expected:,}.")


def _check_hash(path: Path, actual: str, expected: str) -> None:
    if actual != expected:
        raise CorruptCheckpoint(f"{path} is not the file its manifest describes: its SHA-256 differs.")
