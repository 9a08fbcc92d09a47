"""The token file: a short description and then token ids, read by position, never all at once.

    8 bytes   b"HBTOKENS"
    4 bytes   version, 1           (all numbers little-endian)
    4 bytes   length of the header
    header    JSON, filled up with spaces: the fields of `TokenHeader`
    tokens    `num_tokens` of `dtype`

A file is read through `os.pread`: a memory map of a corpus counts its pages as the process's memory.
"""

import errno
import hashlib
import json
import os
import struct
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from homebrew.data.text_file import open_regular
from homebrew.errors import DataError
from homebrew.io import atomic_replace

MAX_HEADER_BYTES = 2**20
"""Of a header; one that is longer is not read. The alphabet of a Chinese text takes a tenth of it."""
MAX_VOCAB_SIZE = 2**31
"""Ids are int32 on the device."""

_MAGIC = b"HBTOKENS"
_VERSION = 1
_PREFIX = struct.Struct("<8sII")
_DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_AT_ONCE = 2**20
"""Tokens written, and checked, at a time."""

Tokens = NDArray[np.integer]


@dataclass(frozen=True)
class TokenHeader:
    """What a token file says of itself."""

    dtype: str
    """"uint16" or "uint32"."""
    num_tokens: int
    vocab_size: int
    """Ids are below it."""
    tokenizer: dict[str, Any] | None
    """Its `to_json`, where it is known."""
    num_text_bytes: int | None
    """UTF-8 bytes of the text that the tokens stand for, where known."""
    sha256: str
    """Of the tokens' bytes."""
    source: str | None
    """Where the text came from, in words."""


def write_tokens(
    path: str | Path,
    ids: Tokens | Tensor | Iterable[Tokens | Tensor],
    *,
    vocab_size: int,
    tokenizer_json: dict[str, Any] | None = None,
    num_text_bytes: int | None = None,
    source: str | None = None,
) -> TokenHeader:
    """Write a token file; it appears at `path` when it is whole and on the disk.

    Args:
        path: where; a token file that is there is replaced, a file of another kind is not. Missing folders are made.
        ids: (n,), integers; or any number of such rows, one after the other, taken as they are written.
        vocab_size: ids must be below it.
        tokenizer_json: the `to_json` of the tokenizer that made the ids.
        num_text_bytes: UTF-8 bytes of the text the ids stand for.
        source: where the text came from, in words.

    Returns:
        The file's header.

    Raises:
        DataError: an id is outside the vocabulary, there is none at all, or the file cannot be written.
    """
    path = Path(path)
    check_replaceable(path)
    if not 1 <= vocab_size <= MAX_VOCAB_SIZE:
        raise DataError(f"vocab_size={vocab_size}: a token file's is between 1 and {MAX_VOCAB_SIZE:,}.")
    dtype = "uint16" if vocab_size <= 2**16 else "uint32"
    header = TokenHeader(dtype, 2**63 - 1, vocab_size, tokenizer_json, num_text_bytes, "0" * 64, source)
    # The number of tokens and their hash are known at the end: room for the longest is left at the beginning.
    room = len(_encode(header, path))
    digest, num_tokens = hashlib.sha256(), 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_replace(path) as new, new.open("rb+") as file:
            file.seek(room)
            for tokens in _pieces(ids, vocab_size, _DTYPES[dtype]):
                file.write(tokens.data)
                digest.update(tokens.data)
                num_tokens += len(tokens)
            if num_tokens == 0:
                raise DataError(f"{path} would hold no token: give some text.")
            header = replace(header, num_tokens=num_tokens, sha256=digest.hexdigest())
            file.seek(0)
            file.write(_encode(header, path, room))
    except OSError as error:
        size = room + num_tokens * _DTYPES[dtype].itemsize
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "Free some space." if full else "Look at the folder and its permissions."
        raise DataError(f"{path} ({size:,} bytes so far) could not be written: {error.strerror}. {advice}") from error
    return header


def check_replaceable(path: Path) -> None:
    """Refuse to take the place of anything but a token file or an empty one: it may be the text itself.

    Raises:
        DataError: something else is there, or nothing can be.
    """
    try:
        is_other = path.exists() and not (path.is_file() and path.stat().st_size == 0) and not is_token_file(path)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror}. Choose another name.") from error
    if is_other:
        raise DataError(f"{path} is there and is no token file: choose another name, or remove it first.")


def _encode(header: TokenHeader, path: Path, room: int = 0) -> bytes:
    text = json.dumps(asdict(header)).encode().ljust(room - _PREFIX.size)
    if len(text) > MAX_HEADER_BYTES:
        raise DataError(
            f"The header of {path} has {len(text):,} bytes, at most {MAX_HEADER_BYTES:,} fit: see what the "
            f"tokenizer's to_json holds."
        )
    return _PREFIX.pack(_MAGIC, _VERSION, len(text)) + text


def _pieces(
    ids: Tokens | Tensor | Iterable[Tokens | Tensor], vocab_size: int, dtype: np.dtype[Any]
) -> Iterator[Tokens]:
    for row in [ids] if isinstance(ids, np.ndarray | Tensor) else ids:
        row = np.asarray(row)
        if row.ndim != 1 or (len(row) and row.dtype.kind not in "iu"):
            raise DataError(f"Token ids must be integers in one row; got {row.dtype} of shape {row.shape}.")
        for start in range(0, len(row), _AT_ONCE):
            piece = row[start : start + _AT_ONCE]
            low, high = int(piece.min()), int(piece.max())
            if low < 0 or high >= vocab_size:
                raise DataError(
                    f"Token id {low if low < 0 else high} is outside the vocabulary of {vocab_size} (0 to "
                    f"{vocab_size - 1}): use the tokenizer that made the ids, or give its vocab_size."
                )
            yield np.ascontiguousarray(piece, dtype)


class TokenFile:
    """A token file, open for reading; made by `TokenFile.open`, closed with the last reference to it.

    Args:
        path: of the file, for messages.
        descriptor: of the open file, which it now owns.
        header: what it says of itself.
        offset: of the first token, in bytes.
    """

    def __init__(self, path: Path, descriptor: int, header: TokenHeader, offset: int) -> None:
        self.path = path
        self.header = header
        self._descriptor = descriptor
        self._offset = offset
        self._dtype = _DTYPES[header.dtype]
        self.close = weakref.finalize(self, os.close, descriptor)

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a token file and believe nothing it says of its size; the tokens are not read.

        Raises:
            DataError: it is no regular file, not a token file, or not as long as it says.
        """
        path = Path(path)
        descriptor = open_regular(path)
        try:
            header, offset = _read_header(path, descriptor)
            return cls(path, descriptor, header, offset)
        except BaseException:
            os.close(descriptor)
            raise

    def __len__(self) -> int:
        return self.header.num_tokens

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens it again."""
        return type(self).open, (self.path,)

    def read(self, start: int, stop: int) -> Tokens:
        """The tokens from `start` up to `stop`, (stop - start,), uint16 or uint32.

        Raises:
            DataError: there are no such positions, the file can no longer be read, or an id is outside the
                vocabulary.
        """
        if not 0 <= start <= stop <= len(self):
            raise DataError(f"{self.path} has tokens 0 to {len(self)}; {start} to {stop} were asked for.")
        size = self._dtype.itemsize
        data = _pread(self.path, self._descriptor, (stop - start) * size, self._offset + start * size)
        tokens: Tokens = np.frombuffer(data, self._dtype)
        if len(tokens) and tokens.max() >= self.header.vocab_size:
            raise DataError(
                f"{self.path} has token id {tokens.max()} between {start} and {stop}, outside its vocabulary of "
                f"{self.header.vocab_size}: the file is damaged; prepare it again."
            )
        return tokens

    def check(self) -> None:
        """Read all of it once.

        Raises:
            DataError: the tokens are not the ones that were written, or one is outside the vocabulary.
        """
        digest = hashlib.sha256()
        for start in range(0, len(self), _AT_ONCE):
            digest.update(self.read(start, min(start + _AT_ONCE, len(self))).data)
        if digest.hexdigest() != self.header.sha256:
            raise DataError(
                f"{self.path} is damaged: its tokens have SHA-256 {digest.hexdigest()}, its header says "
                f"{self.header.sha256}. Prepare it again, or copy it again."
            )


def is_token_file(path: str | Path) -> bool:
    """Whether a file says that it is a token file; whether it is a whole one `TokenFile.open` knows.

    Raises:
        DataError: it is no regular file.
    """
    descriptor = open_regular(Path(path))
    try:
        return os.pread(descriptor, len(_MAGIC), 0) == _MAGIC
    finally:
        os.close(descriptor)


def _read_header(path: Path, descriptor: int) -> tuple[TokenHeader, int]:
    size = os.fstat(descriptor).st_size
    if size < _PREFIX.size:
        raise DataError(f"{path} is not a token file: it has {size} bytes. Make one with `homebrew prepare`.")
    magic, version, length = _PREFIX.unpack(_pread(path, descriptor, _PREFIX.size, 0))
    if magic != _MAGIC:
        raise DataError(
            f"{path} is not a token file: it begins with {magic!r}. `homebrew prepare` makes one from text."
        )
    if version != _VERSION:
        raise DataError(f"{path} is a token file of version {version}; this homebrew reads version {_VERSION}.")
    offset = _PREFIX.size + length
    if length > MAX_HEADER_BYTES or offset > size:
        raise DataError(
            f"{path} says its header has {length:,} bytes, of {size:,} in the file and {MAX_HEADER_BYTES:,} allowed: "
            f"it is damaged; prepare it again."
        )
    try:
        described = json.loads(_pread(path, descriptor, length, _PREFIX.size))
    except (ValueError, RecursionError) as error:
        raise DataError(f"The header of {path} is not JSON: {error}. Prepare it again.") from error
    header = _checked_header(path, described)
    expected = offset + header.num_tokens * _DTYPES[header.dtype].itemsize
    if size != expected:
        raise DataError(
            f"{path} has {size:,} bytes; with the {header.num_tokens:,} tokens its header speaks of it would have "
            f"{expected:,}. Copy it again, or prepare it again."
        )
    return header, offset


def _checked_header(path: Path, described: object) -> TokenHeader:
    names = {field.name for field in fields(TokenHeader)}
    if not isinstance(described, dict) or described.keys() != names:
        raise DataError(f"The header of {path} must be an object with {', '.join(sorted(names))}. Prepare it again.")
    rules = {
        "dtype": isinstance(described["dtype"], str) and described["dtype"] in _DTYPES,
        "num_tokens": _is_count(described["num_tokens"], 1, 2**63 - 1),
        "vocab_size": _is_count(described["vocab_size"], 1, MAX_VOCAB_SIZE),
        "tokenizer": described["tokenizer"] is None or isinstance(described["tokenizer"], dict),
        "num_text_bytes": described["num_text_bytes"] is None or _is_count(described["num_text_bytes"], 1, 2**63 - 1),
        "sha256": isinstance(described["sha256"], str) and len(described["sha256"]) == 64,
        "source": described["source"] is None or isinstance(described["source"], str),
    }
    for name, holds in rules.items():
        if not holds:
            raise DataError(f"The header of {path} has {name}={described[name]!r:.100}. Prepare it again.")
    return TokenHeader(**described)


def _is_count(value: object, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _pread(path: Path, descriptor: int, size: int, offset: int) -> bytes:
    """Bytes at a position; the kernel may hand them out in parts."""
    parts: list[bytes] = []
    while size:
        try:
            part = os.pread(descriptor, size, offset)
        except OSError as error:
            raise DataError(f"{path} cannot be read at byte {offset:,}: {error.strerror}.") from error
        if not part:
            raise DataError(f"{path} ends at byte {offset:,}, where {size:,} more were: it was cut while in use.")
        parts.append(part)
        size, offset = size - len(part), offset + len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
