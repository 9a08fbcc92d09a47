"""Reads files of a checkpoint, verified by size and hash, without following links.

All functions but `is_regular` raise CorruptCheckpoint if the path is not a regular file or not the expected one.
"""

import hashlib
import stat
from pathlib import Path

from homebrew.bounded_readers import open_file
from homebrew.errors import CorruptCheckpoint


def is_regular(path: Path, *, size: int) -> bool:
    """Return whether `path` is a regular file, not a symbolic link, of `size` bytes."""
    try:
        status = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size == size


def read_verified(path: Path, *, size: int, sha256: str) -> bytes:
    """Read a file and check its size and hash; the returned bytes are the ones that were hashed."""
    with open_file(path, CorruptCheckpoint) as (file, actual_size):
        _check_size(path, actual_size, size)
        data = file.read(size)
    _check_hash(path, hashlib.sha256(data).hexdigest(), sha256)
    return data


def verify(path: Path, *, size: int, sha256: str) -> None:
    """Check a file's size and hash without loading it into memory."""
    with open_file(path, CorruptCheckpoint) as (file, actual_size):
        _check_size(path, actual_size, size)
        _check_hash(path, hashlib.file_digest(file, "sha256").hexdigest(), sha256)


def measure(path: Path) -> tuple[int, str]:
    """Return a file's size in bytes and its SHA-256 in hexadecimal."""
    with open_file(path, CorruptCheckpoint) as (file, size):
        return size, hashlib.file_digest(file, "sha256").hexdigest()


def _check_size(path: Path, actual: int, expected: int) -> None:
    if actual != expected:
        raise CorruptCheckpoint(f"{path} has {actual:,} bytes; its manifest says {expected:,}.")


def _check_hash(path: Path, actual: str, expected: str) -> None:
    if actual != expected:
        raise CorruptCheckpoint(f"{path} is not the file its manifest describes: its SHA-256 differs.")
