"""Read text files with error messages that name the file and the remedy.

Text is read as it is: the characters CR and LF are not translated, so that the bytes tokenizer sees the file's bytes.
"""

import codecs
import io
import shlex
from collections.abc import Iterator
from pathlib import Path

from homebrew.data.binary_kinds import describe_binary, is_known_kind
from homebrew.errors import DataError
from homebrew.io import absolute_path

_CONTROL_CHARACTERS = [chr(code) for code in (*range(1, 32), 127) if chr(code) not in "\a\b\t\n\v\f\r\x1b"]
"""Control characters that do not occur in texts, other than NUL."""

_MAX_CONTROL_CHARACTERS = 0.1
"""Share of control characters above which a file is binary. Texts extracted from other formats have a few."""


_MAX_CONTROL_BYTES = 0.05
"""Share of control bytes above which a file that is not UTF-8 is binary. Compressed data has about 0.1."""

_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
"""The first bytes of most UTF-16 files."""

_BLOCK_CHARACTERS = 2**20
"""Number of characters to read and check at a time. A device without an end, such as /dev/zero, fails the check."""


def read_text(path: str | Path) -> str:
    """Read a UTF-8 text file."""
    return "".join(text_chunks(path, _BLOCK_CHARACTERS))


def text_chunks(path: str | Path, chunk_characters: int) -> Iterator[str]:
    """Read a UTF-8 text file in chunks of at most `chunk_characters`. Which files are text does not depend on it.

    Raises:
        DataError: If the file cannot be read, is not UTF-8, or is binary.
    """
    num_characters = num_control = 0
    start = b""
    try:
        with absolute_path(path).open("rb") as raw, io.TextIOWrapper(raw, encoding="utf-8", newline="") as file:
            start = raw.peek()
            while block := file.read(_BLOCK_CHARACTERS):
                num_characters += len(block)
                num_control += _num_control(block)
                if "\0" in block or num_control > _MAX_CONTROL_CHARACTERS * num_characters:
                    raise _binary_error(path, start)
                for i in range(0, len(block), chunk_characters):
                    yield block[i : i + chunk_characters]
    except OSError as error:
        raise read_error(path, error) from error
    except UnicodeDecodeError as error:
        raise _decode_error(path, error, start) from error


def is_text(start: bytes) -> bool:
    """Return whether a file's first bytes are UTF-8 text. The last character may be incomplete."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(start)
    except UnicodeDecodeError:
        return False
    return "\0" not in text and _num_control(text) <= _MAX_CONTROL_CHARACTERS * len(text)


def check_regular_file(path: str | Path) -> None:
    """Raise an error for a missing file, a directory or a pipe. Opening a pipe could block."""
    try:
        absolute_path(path).stat()
    except OSError as error:
        raise read_error(path, error) from error
    if not absolute_path(path).is_file():
        raise DataError(f"{str(path)!r} is not a regular file. If it is a pipe, write its content to a file first.")


def read_error(path: str | Path, error: OSError) -> DataError:
    """Build the error for a file that could not be read."""
    return DataError(f"{str(path)!r} cannot be read: {error.strerror}. Check the path and its permissions.")


def _decode_error(path: str | Path, error: UnicodeDecodeError, start: bytes) -> DataError:
    """Build the error for a file, with the first bytes `start`, that is not UTF-8."""
    if is_known_kind(start) or _has_binary_bytes(error.object):
        return _binary_error(path, start)
    # Most text files that are not in Unicode are in Latin-1.
    encoding = "utf-16" if error.object.startswith(_UTF16_MARKS) else "latin1"
    return DataError(
        f"{str(path)!r} cannot be read as UTF-8 text: {error}. If it is text in another encoding, such as "
        f"{encoding}, convert it: iconv -f {encoding} -t utf-8 {shlex.quote(str(path))} > converted.txt"
    )


def _has_binary_bytes(data: bytes) -> bool:
    """Return whether bytes that are not UTF-8 are not text in another encoding either."""
    if data.startswith(_UTF16_MARKS):
        return False  # UTF-16 has NUL bytes
    num_control = sum(data.count(ord(character)) for character in _CONTROL_CHARACTERS)
    return 0 in data or num_control > _MAX_CONTROL_BYTES * len(data)


def _num_control(text: str) -> int:
    return sum(map(text.count, _CONTROL_CHARACTERS))


def _binary_error(path: str | Path, start: bytes) -> DataError:
    return DataError(f"{str(path)!r} is a binary file: {describe_binary(start)}")
