"""Read token files in the formats of `token_formats`, and write homebrew's format: `book.npy` beside `book.json`."""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from homebrew.bounded_readers import open_file, parse_json, read_bytes
from homebrew.data.token_formats import NPY_HEADER_BYTES, npy_header, open_tokens, token_dtype
from homebrew.data.token_ids import MAX_VOCAB_SIZE, TokenIds, as_token_ids, check_token_ids, is_tensor
from homebrew.data.token_metadata import REMEDY, TokenMetadata, metadata_path
from homebrew.errors import DataError
from homebrew.integers import as_integer
from homebrew.io import absolute_path, atomic_replace, is_disk_full

if TYPE_CHECKING:
    from torch import Tensor

_CHUNK_TOKENS = 2**20
"""Number of tokens validated and written at a time."""

_DIGEST_BLOCKS = 64
_DIGEST_BLOCK_TOKENS = 2**15
"""Number and size of the blocks that a file's digest depends on if it has no metadata. Smaller files are read fully."""


class TokenFile:
    """A token file in one of the formats of `token_formats`, memory-mapped for reading.

    `ids` are all ids, (num_tokens,), uint16 or uint32, read-only and not checked. `read` checks the ids it returns.

    Args:
        path: Path of the file. The JSON file of a `.npy` file is expected beside it.
        vocab_size: Size of the vocabulary. It is only needed for a file that does not contain it, such as nanoGPT's.

    Raises:
        DataError: If a file is missing or invalid, or the array and its metadata do not match.
    """

    def __init__(self, path: str | Path, vocab_size: int | None = None) -> None:
        self.path = absolute_path(path)
        self.ids, self.metadata = open_tokens(self.path, vocab_size)

    def __len__(self) -> int:
        return len(self.ids)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the path only. A data loader's worker maps the file again."""
        return type(self), (self.path, self.metadata.vocab_size)

    def read(self, start: int, stop: int) -> TokenIds:
        """Read the tokens from `start` to `stop`, (stop - start,), uint16 or uint32.

        Raises:
            DataError: If a token id is outside the vocabulary. On a GPU it would abort the process.
        """
        tokens = self.ids[start:stop]
        if len(tokens) and tokens.max() >= self.metadata.vocab_size:
            position = int(tokens.argmax())
            raise DataError(
                f"{self.path} has token id {tokens[position]} at position {start + position}, outside the vocabulary "
                f"of {self.metadata.vocab_size}. The file is corrupt or was made by another tokenizer: restore it, or "
                f"name the tokenizer that made it."
            )
        return tokens

    @property
    def digest(self) -> str:
        """Hash of the ids: the SHA-256 in the metadata or, without metadata, a hash of blocks all over the file.

        At most `_DIGEST_BLOCKS` blocks are read, so that a run on hundreds of GB starts at once.
        """
        if self.metadata.sha256 is not None:
            return self.metadata.sha256
        digest = hashlib.sha256(f"{self.ids.dtype} {len(self)}\n".encode())
        step = max(_DIGEST_BLOCK_TOKENS, -(-len(self) // _DIGEST_BLOCKS))
        for start in range(0, len(self), step):
            digest.update(self.ids[start : start + _DIGEST_BLOCK_TOKENS].data)
        digest.update(self.ids[-_DIGEST_BLOCK_TOKENS:].data)
        return digest.hexdigest()

    def verify(self) -> None:
        """Read the file once and compare its SHA-256 with the metadata. A file without metadata is not read.

        Raises:
            DataError: If the file cannot be read, or its SHA-256 differs.
        """
        if self.metadata.sha256 is None:
            return
        with open_file(self.path, DataError) as (file, _):
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if sha256 != self.metadata.sha256:
            raise DataError(
                f"{self.path} is corrupt: its SHA-256 is {sha256}, but its metadata says {self.metadata.sha256}. "
                f"{REMEDY}"
            )


def write_tokens(
    path: str | Path,
    ids: "TokenIds | Tensor | Iterable[TokenIds | Tensor]",
    *,
    vocab_size: int,
    tokenizer_json: dict[str, Any] | None = None,
    num_text_bytes: int | None = None,
    count_text_bytes: Callable[[TokenIds], int] | None = None,
    source: str | None = None,
) -> TokenMetadata:
    """Write a token file atomically: its `.npy` file, then its JSON file.

    Args:
        path: Path of the `.npy` file. An existing token file, valid or corrupt, is replaced. Missing directories are
            created.
        ids: Token ids, (num_tokens,), integers; or an iterable of such arrays, which are written one after another.
        vocab_size: Size of the vocabulary; all ids must be below it.
        tokenizer_json: `Tokenizer.to_json` of the tokenizer that made the ids.
        num_text_bytes: Size of the text in UTF-8 bytes.
        count_text_bytes: Function that returns the size of the text of given ids, if `num_text_bytes` is not known.
        source: Description of the text's origin.

    Raises:
        DataError: If an id is outside the vocabulary, there are no ids, an argument has the wrong type, or the files
            cannot be written.
    """
    path = absolute_path(path)
    check_output_path(path)
    vocab_size = as_integer("vocab_size", vocab_size, 1, MAX_VOCAB_SIZE, error=DataError)
    if num_text_bytes is not None:
        num_text_bytes = as_integer("num_text_bytes", num_text_bytes, 0, error=DataError)
    metadata = TokenMetadata(vocab_size, 0, num_text_bytes, tokenizer_json, source, sha256="")
    metadata.check(metadata_path(path))
    dtype, num_tokens = token_dtype(vocab_size), 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The files are renamed when the contexts exit, in reverse order: the JSON file last.
        with atomic_replace(metadata_path(path)) as new_metadata, atomic_replace(path) as new_array:
            with new_array.open("rb+") as file:
                file.write(npy_header(dtype, num_tokens))
                for chunk in _chunks(ids, vocab_size, dtype):
                    file.write(chunk.data)
                    num_tokens += len(chunk)
                    if count_text_bytes is not None:
                        num_text_bytes = (num_text_bytes or 0) + count_text_bytes(chunk)
                if num_tokens == 0:
                    raise DataError(f"There are no tokens to write to {path}. Give a text that is not empty.")
                file.seek(0)
                file.write(npy_header(dtype, num_tokens))
                file.seek(0)
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            metadata = replace(metadata, num_tokens=num_tokens, num_text_bytes=num_text_bytes, sha256=sha256)
            new_metadata.write_text(metadata.to_json(), encoding="utf-8")
    except OSError as error:
        remedy = "Free some disk space." if is_disk_full(error) else "Check the directory and its permissions."
        raise DataError(
            f"{path} cannot be written: {error.strerror}, after {num_tokens * dtype.itemsize:,} bytes. {remedy}"
        ) from error
    return metadata


def check_output_path(path: Path) -> None:
    """Check that writing a token file overwrites nothing but a token file, which may be corrupt, or an empty file."""
    if path.suffix != ".npy":
        raise DataError(f"The token file {path} must end in .npy. Use the name {path.with_suffix('.npy')}.")
    metadata = metadata_path(path)
    text = read_bytes(metadata, DataError) if metadata.exists() else b""
    if b'"metadata_sha256"' in text:  # homebrew's metadata: the array, even if corrupt, belongs to it
        return
    is_array = _is_token_array(path)
    for existing, is_ours in ((path, is_array), (metadata, is_array and not _is_json(text))):
        is_empty = existing.is_file() and existing.stat().st_size == 0
        if existing.exists() and not is_ours and not is_empty:
            raise DataError(
                f"{existing} exists and does not belong to a token file. Choose another name, or delete it first."
            )


def _is_token_array(path: Path) -> bool:
    """Return whether a file starts with the header that `write_tokens` writes, for any number of tokens."""
    if not path.is_file():
        return False
    with open_file(path, DataError) as (file, _):
        start = file.read(NPY_HEADER_BYTES)
    shape = re.search(rb"'shape': \((\d{1,19}),\)", start)
    return shape is not None and start in {npy_header(np.dtype(d), int(shape[1])) for d in ("<u2", "<u4")}


def _is_json(text: bytes) -> bool:
    try:
        parse_json(b'{"value": %b}' % text, "", DataError)  # an object, whatever the value is
    except DataError:
        return False
    return True


def _chunks(
    ids: "TokenIds | Tensor | Iterable[TokenIds | Tensor]", vocab_size: int, dtype: np.dtype[Any]
) -> Iterator[TokenIds]:
    for array in [ids] if isinstance(ids, np.ndarray) or is_tensor(ids) or not isinstance(ids, Iterable) else ids:
        array = as_token_ids(array)
        for start in range(0, len(array), _CHUNK_TOKENS):
            chunk = array[start : start + _CHUNK_TOKENS]
            check_token_ids(chunk, vocab_size)
            yield np.ascontiguousarray(chunk, dtype)
