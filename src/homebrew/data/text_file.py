"""Files opened with care."""

import os
import stat
from pathlib import Path

from homebrew.errors import DataError


def unreadable(path: str | Path, error: OSError | UnicodeDecodeError) -> DataError:
    """The error of a text that could not be read."""
    if isinstance(error, OSError):
        return DataError(f"{str(path)!r} cannot be read: {error.strerror}. Check the path and its permissions.")
    return DataError(f"{str(path)!r} cannot be read as UTF-8 text: {error}. Give a text file.")


def read_text(path: str | Path) -> str:
    """A text file's text.

    Raises:
        DataError: it cannot be read as UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(path, error) from error


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
