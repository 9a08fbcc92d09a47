"""The plan of `prepare`: cuts the input into parts of bounded size, at places that do not change a text's tokens."""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from homebrew.data.gpt2_vocabulary import END_OF_TEXT
from homebrew.data.preparation.documents import Span, file_format, open_parquet
from homebrew.data.text_file import check_regular_file, read_error
from homebrew.data.token_formats import is_token_file
from homebrew.errors import DataError
from homebrew.io import absolute_path, strict_json

PART_BYTES = 2**24
"""Size of a part. If a run is killed, its unfinished parts are lost."""

_MAX_SPANS = 1024
"""Maximum number of files in a part."""

_SEARCH_BYTES = 2**20
"""Number of bytes that are searched for a place to cut. If there is no such place, the part becomes longer."""

_WORD_END = re.compile(r"\S(?=[ \t\r\n])")
"""A place where a text can be cut: a GPT-2 word never continues from a non-space character into white space."""


class Part:
    """A part of the input, which one process encodes.

    `digest` is a hash of the spans and of the sizes and modification times of their files.

    Args:
        spans: The spans of the part, each with the number of bytes to read.
    """

    def __init__(self, spans: Sequence[tuple[Span, int]]) -> None:
        self.spans = [span for span, _ in spans]
        self.num_bytes = sum(size for _, size in spans)
        self._files = self._stat_files()
        self.digest = hashlib.sha256(strict_json([self.spans, self._files]).encode()).hexdigest()[:16]

    def check_unchanged(self) -> None:
        """Check that the files have not changed since the part was planned.

        Raises:
            DataError: If a file has changed.
        """
        for before, now in zip(self._files, self._stat_files(), strict=True):
            if before != now:
                raise DataError(
                    f"{before[0]!r} changed while it was read. Run the same command again when the file is complete."
                )

    def _stat_files(self) -> list[tuple[str, int, int]]:
        """Return the path, size and modification time of each file."""
        files = []
        for path, *_ in self.spans:
            try:
                stat = Path(path).stat()
            except OSError as error:
                raise read_error(path, error) from error
            files.append((path, stat.st_size, stat.st_mtime_ns))
        return files


def plan_parts(files: Iterable[str | Path], *, split_at_end_of_text: bool) -> list[Part]:
    """Cut files into parts.

    Args:
        files: Paths of the files.
        split_at_end_of_text: Whether "<|endoftext|>" separates documents, so that texts are cut only there.

    Raises:
        DataError: If a file cannot be read, is not a regular file, or is a token file.
    """
    parts: list[Part] = []
    spans: list[tuple[Span, int]] = []
    for file in files:
        try:
            for span, size in _spans(file, split_at_end_of_text):
                if spans and (sum(size for _, size in spans) + size > PART_BYTES or len(spans) == _MAX_SPANS):
                    parts.append(Part(spans))
                    spans = []
                spans.append((span, size))
        except OSError as error:
            raise read_error(file, error) from error
    return [*parts, Part(spans)] if spans else parts


def _spans(path: str | Path, split_at_end_of_text: bool) -> Iterator[tuple[Span, int]]:
    """Cut a file into spans, and yield each with its size."""
    check_regular_file(path)
    format_name, compression = file_format(path)
    path = absolute_path(path)
    if format_name == "parquet":
        yield from _parquet_spans(str(path))
        return
    if format_name == "text" and not compression and is_token_file(path):
        raise DataError(f"{path} is a token file. Give the text that it was made from, or train on it directly.")
    size = path.stat().st_size
    if compression or size <= PART_BYTES:
        yield Span(str(path)), size
        return
    find = _find_line if format_name == "jsonl" else _find_end_of_text if split_at_end_of_text else _find_word_end
    start = 0
    with path.open("rb") as file:
        for position in range(PART_BYTES, size, PART_BYTES):
            file.seek(position)
            offset = find(file.read(_SEARCH_BYTES))
            if offset is not None and position + offset > start:
                yield Span(str(path), start, position + offset), position + offset - start
                start = position + offset
    yield Span(str(path), start), size - start


def _parquet_spans(path: str) -> Iterator[tuple[Span, int]]:
    metadata = open_parquet(path).metadata
    start = size = 0
    for i in range(metadata.num_row_groups):
        size += metadata.row_group(i).total_byte_size
        if size >= PART_BYTES or i == metadata.num_row_groups - 1:
            yield Span(path, start, i + 1), size
            start, size = i + 1, 0


def _find_line(data: bytes) -> int | None:
    """Return where a line starts."""
    return data.find(b"\n") + 1 or None


def _find_end_of_text(data: bytes) -> int | None:
    """Return where the end-of-text marker starts."""
    offset = data.find(END_OF_TEXT.encode())
    return None if offset < 0 else offset


def _find_word_end(data: bytes) -> int | None:
    """Return where a word ends."""
    text = data.lstrip(bytes(range(0x80, 0xC0))).decode(errors="surrogateescape")  # start at a whole character
    match = _WORD_END.search(text)
    return match and len(data) - len(text[match.end() :].encode(errors="surrogateescape"))
