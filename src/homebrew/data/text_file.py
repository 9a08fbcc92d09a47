"""Read text files with error messages that name the file and the remedy."""

import codecs
import shlex
from pathlib import Path

from homebrew.errors import DataError
from homebrew.io import absolute_path


def read_text(path: str | Path) -> str:
    """Read a UTF-8 text file."""
    try:
        return absolute_path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise read_error(path, error) from error


def check_regular_file(path: str | Path) -> None:
    """Raise an error for a missing file, a directory or a pipe. Opening a pipe could block."""
    try:
        absolute_path(path).stat()
    except (OSError, ValueError) as error:
        raise read_error(path, error) from error
    if not absolute_path(path).is_file():
        raise DataError(f"{str(path)!r} is not a regular file. If it is a pipe, write its content to a file first.")


def read_error(path: str | Path, error: OSError | ValueError) -> DataError:
    """Build the error for a file that could not be read."""
    if isinstance(error, OSError):
        return DataError(f"{str(path)!r} cannot be read: {error.strerror}. Check the path and its permissions.")
    if isinstance(error, UnicodeDecodeError):
        # Most text files that are not in Unicode are in Latin-1.
        encoding = "utf-16" if error.object.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "latin1"
        return DataError(
            f"{str(path)!r} cannot be read as UTF-8 text: {error}. If it is text in another encoding, such as "
            f"{encoding}, convert it: iconv -f {encoding} -t utf-8 {shlex.quote(str(path))} > converted.txt"
        )
    return DataError(f"{str(path)!r} cannot be read: {error}. Check the path.")
