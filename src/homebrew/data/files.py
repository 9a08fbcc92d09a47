"""Files opened with care and replaced whole."""

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from homebrew.errors import DataError


def unreadable(path: str | Path, error: OSError | UnicodeDecodeError) -> DataError:
    """The error of a text that could not be read."""
    if isinstance(error, OSError):
        return DataError(f"{str(path)!r} cannot be read: {error.strerror}. Check the path and its permissions.")
    return DataError(f"{str(path)!r} cannot be read as UTF-8 text: {error}. Give a text file.")


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file to write to: at the end it takes the place of `path`, whole and on the disk, its mode by the umask.

    Raises:
        OSError: it could not be written; what stood at `path` still does.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_regular(path: Path) -> int:
    """A descriptor to read a file by, opened without waiting on a pipe.

    Links are followed: only the user says which file this is, and in the hub's cache all are links.

    Raises:
        DataError: there is no such regular file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise DataError(f"{path} cannot be opened: {error.strerror}. Check the path and its permissions.") from error
    except ValueError as error:
        raise DataError(f"{str(path)!r} is no path: {error}.") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DataError(f"{path} is not a regular file: give the path of one.")
    return descriptor
