"""Formats of token files, each opened as a read-only, memory-mapped array of token ids.

- homebrew's: `book.npy`, a NumPy array, beside `book.json`, its metadata. The array is one-dimensional, uint16 if
  `vocab_size` is at most 65,536 and uint32 otherwise. Any program that reads NumPy's format can read it.
- llm.c's: a header of 256 int32, then ids of GPT-2's tokenizer, uint16, or of Llama 3's, uint32.
- nanoGPT's: `train.bin`, uint16 ids without a header. The file does not record the tokenizer.

All are little-endian. Opening a file does not load it. The mapped pages count towards the process's memory (RssFile),
but they are unmodified pages of the page cache, which the kernel drops when memory is short.
"""

from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np

from homebrew.bounded_readers import open_file
from homebrew.data.text_file import check_regular_file, is_text, read_error
from homebrew.data.token_ids import TokenIds
from homebrew.data.token_metadata import REMEDY, TokenMetadata, metadata_path
from homebrew.errors import DataError
from homebrew.io import absolute_path

NPY_HEADER_BYTES = 128

_NPY_MAGIC = b"\x93NUMPY"
_ZIP_MAGIC = b"PK\x03\x04"
_LLMC_HEADER_BYTES = 1024
_LLMC_FORMATS: dict[bytes, tuple[str, tuple[int, ...], int, dict[str, Any] | None]] = {
    (20240520).to_bytes(4, "little"): ("<u2", (1,), 50_257, {"name": "gpt2"}),
    (20240801).to_bytes(4, "little"): ("<u4", (1, 7), 128_256, None),
}
"""dtype, versions, size of the vocabulary and tokenizer by magic number."""


def is_token_file(path: str | Path) -> bool:
    """Return whether a file's first bytes and name are those of a token file. `open_tokens` validates its content."""
    start = _read_start(path)
    return start.startswith((_NPY_MAGIC, *_LLMC_FORMATS)) or _is_headerless(Path(path), start)


def named_tokenizer(path: str | Path) -> dict[str, Any] | None:
    """Return the description of the tokenizer that a file names, or None: texts and nanoGPT's files name none."""
    if _read_start(path).startswith((_NPY_MAGIC, *_LLMC_FORMATS)):
        return open_tokens(absolute_path(path))[1].tokenizer
    return None


def open_tokens(path: Path, vocab_size: int | None = None) -> tuple[TokenIds, TokenMetadata]:
    """Map a token file into memory.

    Args:
        path: Absolute path of the file.
        vocab_size: Size of the vocabulary, for a file that does not contain it.

    Returns:
        The ids, (num_tokens,), uint16 or uint32, read-only, and the metadata, from the JSON file or implied by the
        format.

    Raises:
        DataError: If the file is not a valid token file, or its vocabulary is unknown.
    """
    start = _read_start(path)
    if start.startswith(_NPY_MAGIC):
        return _open_npy(path)
    if start.startswith(tuple(_LLMC_FORMATS)) or (_is_headerless(path, start) and _has_header(start)):
        return _open_llmc(path, start)
    if _is_headerless(path, start):
        return _open_headerless(path, start, vocab_size)
    raise DataError(
        f"{path} is not a token file: it is not in NumPy's .npy format, nor one of llm.c's or nanoGPT's .bin files. "
        f"Run `homebrew prepare` to make a token file from text."
    )


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the dtype of a `.npy` token file for a vocabulary of the given size."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def npy_header(dtype: np.dtype[Any], num_tokens: int) -> bytes:
    """Return the bytes before a one-dimensional array in NumPy's format 1.0, as `np.save` writes them.

    The header has the same length for any number of tokens, so the number can be filled in when it is known.
    """
    text = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': ({num_tokens},), }}"
    start = _NPY_MAGIC + b"\x01\x00" + (NPY_HEADER_BYTES - 10).to_bytes(2, "little")
    return start + text.ljust(NPY_HEADER_BYTES - len(start) - 1).encode() + b"\n"


def _open_npy(path: Path) -> tuple[TokenIds, TokenMetadata]:
    if not metadata_path(path).exists():
        raise DataError(
            f"{path} has no metadata: {metadata_path(path)} does not exist. Copy it along with the .npy file, or run "
            f"`homebrew prepare` again. For an array from another program, write both files with "
            f"homebrew.data.token_file.write_tokens."
        )
    metadata = TokenMetadata.read(metadata_path(path))
    dtype, num_tokens = token_dtype(metadata.vocab_size), metadata.num_tokens
    header = npy_header(dtype, num_tokens)
    num_bytes = len(header) + num_tokens * dtype.itemsize
    with open_file(path, DataError) as (file, size):
        start = file.read(len(header))
        # The header is compared, not parsed: a corrupt header length, for example, would shift the ids.
        if start != header:
            position = next((i for i in range(len(start)) if start[i] != header[i]), len(start))
            problem = f"its header differs at byte {position}"
        elif size != num_bytes:
            problem = f"it has {size:,} bytes instead of {num_bytes:,}"
        else:
            return _map(file, dtype, len(header), num_tokens), metadata
    raise DataError(
        f"{path} is corrupt: it is not an array of {dtype} with shape {(num_tokens,)}, as its metadata says, because "
        f"{problem}. {REMEDY}"
    )


def _open_llmc(path: Path, start: bytes) -> tuple[TokenIds, TokenMetadata]:
    remedy = "Download it again, or write it with llm.c's scripts."
    if len(start) < _LLMC_HEADER_BYTES:
        raise DataError(
            f"{path} is truncated: it ends at byte {len(start)}, within llm.c's header of {_LLMC_HEADER_BYTES} bytes. "
            f"{remedy}"
        )
    magic, version, num_tokens = np.frombuffer(start, "<i4", 3).tolist()
    if start[:4] not in _LLMC_FORMATS:
        raise DataError(
            f"{path} has a header with the magic number {magic} at byte 0, but llm.c's token files have "
            f"{' or '.join(str(int.from_bytes(key, 'little')) for key in _LLMC_FORMATS)}. It may be another kind of "
            f"file, or corrupt: {remedy.lower()}"
        )
    dtype, versions, vocab_size, tokenizer = _LLMC_FORMATS[start[:4]]
    if version not in versions:
        raise DataError(
            f"{path} has version {version} at byte 4 of its header, but must have {' or '.join(map(str, versions))}. "
            f"{remedy}"
        )
    expected = _LLMC_HEADER_BYTES + num_tokens * np.dtype(dtype).itemsize
    with open_file(path.resolve(), DataError) as (file, size):
        if num_tokens < 0 or size != expected:
            raise DataError(
                f"{path} has {size:,} bytes, but {expected:,} are expected for the {num_tokens:,} tokens that its "
                f"header has at byte 8. {remedy}"
            )
        ids = _map(file, np.dtype(dtype), _LLMC_HEADER_BYTES, num_tokens)
    return ids, TokenMetadata(vocab_size, num_tokens, None, tokenizer, source=None, sha256=None)


def _open_headerless(path: Path, start: bytes, vocab_size: int | None) -> tuple[TokenIds, TokenMetadata]:
    if vocab_size is None:
        raise DataError(
            f'{path} does not say which tokenizer made its token ids. Name it with tokenizer="gpt2", or on the command '
            f"line with --tokenizer gpt2."
        )
    if vocab_size > 2**16:
        raise DataError(
            f"{path} has no header, so it is read as uint16 ids, but the tokenizer has {vocab_size} ids, which need "
            f"uint32. Write them with homebrew.data.token_file.write_tokens."
        )
    if len(start) >= 16 and any(start) and not any(start[2::4] + start[3::4]):
        raise DataError(
            f"{path} has a zero in every second uint16, from byte 2, so its ids seem to be 32-bit or 64-bit integers. "
            f"Write them as uint16, or with homebrew.data.token_file.write_tokens."
        )
    with open_file(path.resolve(), DataError) as (file, size):
        if size % 2:
            raise DataError(
                f"{path} has an odd length of {size:,} bytes, so it is not an array of uint16: the id at byte "
                f"{size - 1} is incomplete. Copy the file again."
            )
        ids = _map(file, np.dtype("<u2"), 0, size // 2)
    return ids, TokenMetadata(vocab_size, len(ids), None, tokenizer=None, source=None, sha256=None)


def _map(file: BufferedReader, dtype: np.dtype[Any], offset: int, num_tokens: int) -> TokenIds:
    array = np.memmap(file, dtype, mode="r", offset=offset, shape=(num_tokens,))
    return array.view(np.ndarray)  # slicing np.memmap takes twice as long


def _is_headerless(path: Path, start: bytes) -> bool:
    """Return whether a file may be nanoGPT's: a `.bin` file that is neither text nor a `pytorch_model.bin`."""
    return path.suffix == ".bin" and not start.startswith(_ZIP_MAGIC) and not is_text(start)


def _has_header(start: bytes) -> bool:
    """Return whether a file starts as llm.c's files do: a few numbers, then zeros to the header's end."""
    return len(start) == _LLMC_HEADER_BYTES and any(start[:64]) and not any(start[64:])


def _read_start(path: str | Path) -> bytes:
    check_regular_file(path)
    try:
        with absolute_path(path).open("rb") as file:
            return file.read(_LLMC_HEADER_BYTES)
    except OSError as error:
        raise read_error(path, error) from error
