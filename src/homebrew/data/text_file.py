"""Read text files with error messages that name the file and the remedy.

Text is read as it is: CR and LF are not translated, so that the "bytes" tokenizer sees the file's bytes.
"""

import codecs
import io
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from homebrew.errors import DataError
from homebrew.io import absolute_path

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
"""Suffixes of the files that `homebrew prepare` reads as JSON Lines."""

_BLOCK_BYTES = 2**20
"""Number of bytes to read and check at a time. A device without an end, such as /dev/zero, fails the check."""


def read_text(path: str | Path) -> str:
    """Read a UTF-8 text file.

    Raises:
        DataError: As in `text_chunks`.
    """
    return "".join(text_chunks(path, _BLOCK_BYTES))


def text_chunks(path: str | Path, chunk_characters: int) -> Iterator[str]:
    """Read a UTF-8 text file in chunks of at most `chunk_characters`. Errors do not depend on the size of the chunks.

    Raises:
        DataError: If the file cannot be read, is not UTF-8, or is binary; or has JSON, whose markup would become part
            of the text.
    """
    if Path(path).suffix.lower() in JSON_SUFFIXES:
        raise DataError(
            f"{str(path)!r} has JSON. Write its texts to a .txt file or, to train a model on them, tokenize them with "
            f"`homebrew prepare` and use the result."
        )
    try:
        with absolute_path(path).open("rb") as file:
            for block in decode_text(file, path):
                for i in range(0, len(block), chunk_characters):
                    yield block[i : i + chunk_characters]
    except OSError as error:
        raise read_error(path, error) from error


def decode_text(
    file: BinaryIO | io.BufferedIOBase, path: str | Path, start: int = 0, stop: int | None = None
) -> Iterator[str]:
    """Read UTF-8 text in blocks of about a million characters.

    Args:
        file: File to read, at the position `start`.
        path: Path of the file, for messages.
        start: Position of the text in the file, in bytes.
        stop: Position at which to stop. If None, the file is read to its end.

    Raises:
        DataError: If the text is not UTF-8, or is binary.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    num_bytes = num_lines = 0
    data = b"-"
    while data:
        data = file.read(_BLOCK_BYTES if stop is None else min(_BLOCK_BYTES, stop - start - num_bytes))
        try:
            block = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            position = start + num_bytes + len(data) - len(error.object) + error.start
            line = num_lines + 1 + error.object[: error.start].count(b"\n") + count_lines(path, start)
            raise _decode_error(path, error, f"line {line}, byte {position}") from error
        if b"\0" in data:
            raise _binary_error(path)
        num_bytes += len(data)
        num_lines += data.count(b"\n")
        if block:
            yield block


def count_lines(path: str | Path, stop: int) -> int:
    """Return the number of line ends before a position in a file. It is only called for an error message."""
    num_lines = 0
    if stop:
        with absolute_path(path).open("rb") as file:
            while data := file.read(min(_BLOCK_BYTES, stop - file.tell())):
                num_lines += data.count(b"\n")
    return num_lines


def is_text(start: bytes) -> bool:
    """Return whether a file's first bytes are UTF-8 text. The last character may be incomplete."""
    try:
        return "\0" not in codecs.getincrementaldecoder("utf-8")().decode(start)
    except UnicodeDecodeError:
        return False


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


def _decode_error(path: str | Path, error: UnicodeDecodeError, place: str) -> DataError:
    """Build the error for a file that is not UTF-8."""
    is_utf16 = error.object.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    if b"\0" in error.object and not is_utf16:
        return _binary_error(path)
    encoding = "utf-16" if is_utf16 else "latin1"  # most text files that are not in Unicode are in Latin-1
    return DataError(
        f"{str(path)!r} cannot be read as UTF-8 text: {place}: {error.reason}. If it is compressed, decompress it. "
        f"If it is text in another encoding, such as {encoding}, convert it: iconv -f {encoding} -t utf-8 "
        f"{shlex.quote(str(path))} > converted.txt"
    )


def _binary_error(path: str | Path) -> DataError:
    return DataError(
        f"{str(path)!r} is a binary file: it has NUL bytes. Extract its text, as UTF-8, into another file; "
        f"`homebrew prepare` reads .gz, .zst and .parquet. Token ids are read by `homebrew train` and "
        f"TokenDataset.from_file; without a header, as in nanoGPT's train.bin, the file's name must end in .bin."
    )
