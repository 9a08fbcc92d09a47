"""Documents: the texts in the files that `prepare` reads, each a stream of chunks.

A text file is one document, and so is each line of a JSON Lines file and each row of a Parquet file. gzip and zstd
files are decompressed while they are read. Neither a file nor the document in a text file has to fit in memory.
"""

import contextlib
import gzip
import io
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from homebrew.data.gpt2_vocabulary import END_OF_TEXT
from homebrew.data.text_file import JSON_SUFFIXES, count_lines, decode_text, read_error
from homebrew.data.utf8 import encode_utf8
from homebrew.errors import DataError
from homebrew.io import strict_json

_BATCH_ROWS = 256
_BATCH_BYTES = 2**20
"""Maximum number of rows of a Parquet file to read at a time, and their approximate size."""

_BUFFER_BYTES = 2**20


class Span(NamedTuple):
    """A file, or a part of one."""

    path: str
    """Absolute path of the file."""
    start: int = 0
    """First byte or, in a Parquet file, first row group."""
    stop: int | None = None
    """Byte or row group after the last. None for the end of the file."""


class Document(NamedTuple):
    """A text, or the rest of one that began in an earlier span."""

    text: str
    """The text or, if it is long, its beginning."""
    rest: Iterator[str] = iter(())
    """The rest in chunks that are cut anywhere. It has to be read before the next document."""
    is_continued: bool = False
    """Whether the document began in an earlier span, at the start of the same file."""


Format = Literal["text", "jsonl", "parquet"]


def file_format(path: str | Path) -> tuple[Format, str]:
    """Return the format of a file by its name, and the suffix of its compression or an empty string."""
    *_, before, last = ["", "", *(suffix.lower() for suffix in Path(path).suffixes)]
    compression = last if last in (".gz", ".zst") else ""
    suffix = before if compression else last
    if suffix == ".parquet" and compression:
        raise DataError(f"{str(path)!r} is a compressed Parquet file, which is not supported. Decompress it first.")
    return ("jsonl" if suffix in JSON_SUFFIXES else "parquet" if suffix == ".parquet" else "text"), compression


def read_documents(span: Span, text_field: str, *, split_at_end_of_text: bool) -> Iterator[Document]:
    """Read the documents of a span.

    Args:
        span: File, or part of a file, to read.
        text_field: Key or column of the text in JSON Lines and Parquet files.
        split_at_end_of_text: Whether "<|endoftext|>" in a text separates two documents.

    Raises:
        DataError: If the file cannot be read, or has no valid text in a line or row.
    """
    format_name, _ = file_format(span.path)
    if format_name == "parquet":
        documents: Iterable[Document] = map(Document, _parquet_texts(span, text_field))
    elif format_name == "jsonl":
        documents = map(Document, _json_texts(span, text_field))
    else:
        blocks = _text_blocks(span)
        documents = [Document(next(blocks, ""), blocks, is_continued=span.start > 0)]
    return _split_all(documents) if split_at_end_of_text else iter(documents)


def document_beginning(path: str, num_characters: int) -> str:
    """Return the first characters of an uncompressed text file."""
    return next(_text_blocks(Span(path)), "")[:num_characters]


def open_parquet(path: str) -> Any:  # noqa: ANN401 - a `pyarrow.parquet.ParquetFile`
    """Open a Parquet file."""
    _import_pyarrow(path)
    from pyarrow.parquet import ParquetFile

    with _errors(path):
        return ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False)  # does not load whole row groups


def _text_blocks(span: Span) -> Iterator[str]:
    with _open(span) as file, _errors(span.path):
        yield from decode_text(file, span.path, span.start, span.stop)


def _json_texts(span: Span, text_field: str) -> Iterator[str]:
    with _open(span) as file, _errors(span.path):
        position, number = span.start, 0
        while (span.stop is None or position < span.stop) and (line := file.readline()):
            position += len(line)
            number += 1
            if line.isspace():
                continue
            try:
                text = _text_of(json.loads(line.decode()), text_field)
                if b"\\u" in line:
                    encode_utf8(text)  # raises for surrogates, which only a \u escape can produce
            except (ValueError, RecursionError) as error:
                reason = error.reason if isinstance(error, UnicodeDecodeError) else str(error)
                kind = "UTF-8" if isinstance(error, UnicodeDecodeError) else "valid"
                line_number = number + count_lines(span.path, span.start)
                raise DataError(
                    f"{span.path!r}, line {line_number} is not {kind}: {reason.rstrip('.')}. Write one object per "
                    f'line, such as {{{strict_json(text_field)}: "To be"}}.'
                ) from error
            yield text


def _parquet_texts(span: Span, text_field: str) -> Iterator[str]:
    file = open_parquet(span.path)
    names = file.schema_arrow.names
    if text_field not in names:
        raise DataError(
            f"{span.path!r} has no column {text_field!r}, but {', '.join(map(repr, names))}. Set text_field to the "
            f"column of the text."
        )
    stop = file.num_row_groups if span.stop is None else span.stop
    row = sum(file.metadata.row_group(i).num_rows for i in range(span.start))
    with _errors(span.path):
        for batch in _batches(file, range(span.start, stop), text_field):
            for text in batch.column(0):
                try:
                    yield _check_text(text.as_py())
                except ValueError as error:
                    reason = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
                    raise DataError(
                        f"{span.path!r}, row {row} has no valid text in column {text_field!r}: {reason}. Remove the "
                        f"row, or set text_field to the column of the text."
                    ) from error
                row += 1


def _batches(file: Any, groups: Iterable[int], column: str) -> Iterator[Any]:  # noqa: ANN401 - of pyarrow
    """Read a column of row groups in batches of bounded size."""
    from pyarrow import default_memory_pool

    try:
        for i in groups:
            group = file.metadata.row_group(i)
            rows = _BATCH_BYTES * group.num_rows // max(1, group.total_byte_size)
            batch_size = max(1, min(_BATCH_ROWS, rows))
            yield from file.iter_batches(batch_size, row_groups=[i], columns=[column], use_threads=False)
    finally:
        default_memory_pool().release_unused()


def _text_of(value: object, text_field: str) -> str:
    """Return the text in a JSON object."""
    if not isinstance(value, dict):
        raise ValueError(f"it is a {type(value).__name__}")
    if text_field not in value:
        names = ", ".join(map(repr, value))
        raise ValueError(f"it has no field {text_field!r}, but {names:.200}; set text_field to the text's field")
    return _check_text(value[text_field], f"its {text_field!r}")


def _check_text(value: object, name: str = "it") -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is {'null' if value is None else f'a {type(value).__name__}, not a string'}")
    return value


def _split_all(documents: Iterable[Document]) -> Iterator[Document]:
    for document in documents:
        for i, piece in enumerate(_split(itertools.chain([document.text], document.rest))):
            yield Document(next(piece), piece, document.is_continued and i == 0)


def _split(chunks: Iterator[str]) -> Iterator[Iterator[str]]:
    """Split a text at each "<|endoftext|>" into at least one piece. Each piece has to be read before the next."""
    text, start, is_last = "", 0, False

    def piece() -> Iterator[str]:
        nonlocal text, start, is_last
        while (stop := text.find(END_OF_TEXT, start)) < 0:
            kept = max(start, len(text) - len(END_OF_TEXT) + 1)  # may be the beginning of the marker
            yield text[start:kept]
            chunk = next(chunks, None)
            text, start = text[kept:] + (chunk or ""), 0
            if chunk is None:
                yield text
                is_last = True
                return
        yield text[start:stop]
        start = stop + len(END_OF_TEXT)

    while not is_last:
        yield piece()


@contextlib.contextmanager
def _open(span: Span) -> Iterator[BinaryIO | io.BufferedIOBase]:
    """Open the file of a span, decompressed, at the span's start."""
    compression = file_format(span.path)[1]
    try:
        raw = Path(span.path).open("rb")  # noqa: SIM115 - closed below
    except OSError as error:
        raise read_error(span.path, error) from error
    with raw:
        if compression == ".gz":
            yield gzip.GzipFile(fileobj=raw)
        elif compression == ".zst":
            yield io.BufferedReader(_import_pyarrow(span.path).CompressedInputStream(raw, "zstd"), _BUFFER_BYTES)
        else:
            raw.seek(span.start)
            yield raw


@contextlib.contextmanager
def _errors(path: str) -> Iterator[None]:
    """Convert the errors of decompression and of pyarrow to `DataError`."""
    try:
        yield
    except OSError as error:
        if error.strerror is not None:  # raised by the system, not by a decoder
            raise read_error(path, error) from error
        raise _corrupt(path, error) from error
    except (EOFError, zlib.error) as error:
        raise _corrupt(path, error) from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "pyarrow":
            raise
        raise _corrupt(path, error) from error


def _corrupt(path: str, error: Exception) -> DataError:
    reason = str(error).partition("\n")[0].rstrip(".")
    return DataError(f"{path!r} cannot be read: {reason}. Download it again, or give it the suffix of its format.")


def _import_pyarrow(path: str) -> Any:  # noqa: ANN401 - a module
    try:
        import pyarrow
    except ImportError as error:
        raise DataError(
            f"To read {path!r}, the pyarrow library is needed. Run `pip install -e '.[prepare]'` in the cloned "
            f"repository, or `pip install pyarrow`."
        ) from error
    return pyarrow
