"""Durable writes and bounded reads: the file-system operations under a checkpoint."""

import contextlib
import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from homebrew.errors import CheckpointError, CorruptCheckpoint
from homebrew.io import fsync_directory

_CHUNK = 1 << 24


def write_durably(path: Path, *pieces: bytes | memoryview) -> None:
    """Write a new file and wait until it is on the disk; its mode follows the umask.

    Args:
        path: the file.
        pieces: of bytes, one after the other.

    Raises:
        CheckpointError: it could not be written whole, on a full disk for one.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            for piece in pieces:
                view, written = memoryview(piece), 0
                while written < len(view):
                    written += os.write(descriptor, view[written : written + _CHUNK])
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise unwritable(path, sum(map(len, pieces)), error) from error


def unwritable(path: Path, num_bytes: int, error: OSError) -> CheckpointError:
    """The error that says what could not be written, and what to do about it."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    advice = "Free some space." if full else "Look at the folder and its permissions."
    return CheckpointError(f"{path} ({num_bytes:,} bytes) could not be written: {error.strerror}. {advice}")


def make_folder(path: Path) -> None:
    """Make a folder and those above it, and wait until they are on the disk."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        fsync_directory(path.parent)


def rename(path: Path, new: Path) -> None:
    """Rename within a folder, at once."""
    path.rename(new)


def remove_folder(path: Path) -> None:
    """Remove a folder and what is in it; of a link, the link; one that is gone is no error."""
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISDIR(path.lstat().st_mode):
            shutil.rmtree(path)
        else:
            path.unlink()


def is_regular(path: Path, *, size: int) -> bool:
    """Whether this is a regular file, no link to one, of `size` bytes."""
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_size == size


def read_bounded(path: Path, *, max_bytes: int) -> bytes:
    """A file's bytes, without following links or waiting on pipes.

    Args:
        path: the file.
        max_bytes: more are an error, found before they are read.

    Raises:
        CorruptCheckpoint: there is no such regular file, or it is larger.
    """
    with _opened(path) as (file, size):
        if size > max_bytes:
            raise CorruptCheckpoint(f"{path} has {size:,} bytes; at most {max_bytes:,} are expected.")
        return file.read(size)


def read_verified(path: Path, *, size: int, sha256: str) -> bytes:
    """The bytes of a file that must be the one described: those that were hashed, not read again.

    Raises:
        CorruptCheckpoint: there is no such regular file, or it is another one.
    """
    with _opened(path) as (file, found):
        _check_size(path, found, size)
        data = file.read(size)
    _check_hash(path, hashlib.sha256(data).hexdigest(), sha256)
    return data


def verify(path: Path, *, size: int, sha256: str) -> None:
    """Check that a file is the one described, without holding it in memory.

    Raises:
        CorruptCheckpoint: there is no such regular file, or it is another one.
    """
    digest = hashlib.sha256()
    with _opened(path) as (file, found):
        _check_size(path, found, size)
        for start in range(0, size, _CHUNK):  # and no more if the file grows meanwhile
            digest.update(file.read(min(_CHUNK, size - start)))
    _check_hash(path, digest.hexdigest(), sha256)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """A regular file and its size."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (OSError, ValueError) as error:  # the latter of a name that no file can have
        raise CorruptCheckpoint(f"{path} cannot be opened: {getattr(error, 'strerror', error)}.") from error
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise CorruptCheckpoint(f"{path} is not a regular file.")
        with open(descriptor, "rb", closefd=False) as file:
            yield file, found.st_size
    except OSError as error:
        raise CorruptCheckpoint(f"{path} cannot be read: {error.strerror}.") from error
    finally:
        os.close(descriptor)


def _check_size(path: Path, found: int, expected: int) -> None:
    if found != expected:
        raise CorruptCheckpoint(f"{path} has {found:,} bytes; its manifest says {expected:,}.")


def _check_hash(path: Path, found: str, expected: str) -> None:
    if found != expected:
        raise CorruptCheckpoint(f"{path} is not the file its manifest describes: its SHA-256 differs.")
