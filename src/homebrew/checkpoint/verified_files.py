"""Reads files of a checkpoint, verified by size and hash, without following links.

All functions but `is_regular` raise CorruptCheckpoint if the path is not a regular file or not the expected one.
"""

import hashlib
import stat
from dataclasses import dataclass
from pathlib import Path

from homebrew.bounded_readers import open_file
from homebrew.errors import CorruptCheckpoint


@dataclass(frozen=True)
class Entry:
    """Size in bytes and hexadecimal SHA-256 of a file in a manifest."""

    size: int
    sha256: str


def is_regular(path: Path, *, size: int) -> bool:
    """Return whether `path` is a regular file, not a symbolic link, of `size` bytes."""
    try:
        status = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size == size


def read_verified(path: Path, entry: Entry) -> bytes:
    """Read a file and check its size and hash; the returned bytes are the ones that were hashed."""
    with open_file(path, CorruptCheckpoint) as (file, size):
        _check_size(path, size, entry)
        data = file.read(size)
    _check_hash(path, hashlib.sha256(data).hexdigest(), entry)
    return data


def verify(path: Path, entry: Entry) -> None:
    """Check a file's size and hash without loading it into memory."""
    with open_file(path, CorruptCheckpoint) as (file, size):
        _check_size(path, size, entry)
        _check_hash(path, hashlib.file_digest(file, "sha256").hexdigest(), entry)


def measure(path: Path) -> Entry:
    """Return the entry of a file."""
    with open_file(path, CorruptCheckpoint) as (file, size):
        return Entry(size, hashlib.file_digest(file, "sha256").hexdigest())


def _check_size(path: Path, size: int, entry: Entry) -> None:
    if size != entry.size:
        raise CorruptCheckpoint(f"{path} has {size:,} bytes; its manifest says {entry.size:,}.")


def _check_hash(path: Path, sha256: str, entry: Entry) -> None:
    if sha256 != entry.sha256:
        raise CorruptCheckpoint(f"{path} is not the file its manifest describes: its SHA-256 differs.")
