"""Bounded readers of JSON and safetensors files, which may be corrupt or hostile.

All structured files of checkpoints, model folders, adapters and token files are read here, within the same limits on
their size and on the number of objects that are created from them. Each function takes the class of the error that it
raises.
"""

import contextlib
import errno
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from safetensors import SafetensorError, safe_open  # noqa: TID251 - the only use

from homebrew.errors import HomebrewError
from homebrew.io import open_regular

if TYPE_CHECKING:
    from torch import Tensor

MAX_BYTES = 16 * 2**20
"""Maximum size of a JSON or text file, and of a safetensors file's header. GPT-2's `tokenizer.json` has 3.6 MB."""

MAX_JSON_VALUES = 2**20
"""Maximum number of values in a JSON file. GPT-2's `tokenizer.json` has 0.25 million."""

MAX_JSON_DEPTH = 64
MAX_TENSORS = 2**16
MAX_RANK = 64
"""Maximum number of dimensions of a tensor. PyTorch's operations support no more."""

SAFETENSORS_DTYPES = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.int64": "I64",
    "torch.int32": "I32",
    "torch.int16": "I16",
    "torch.int8": "I8",
    "torch.uint8": "U8",
    "torch.bool": "BOOL",
    "torch.complex64": "C64",
    "torch.float8_e4m3fn": "F8_E4M3",
    "torch.float8_e5m2": "F8_E5M2",
}
"""The name in safetensors files of each supported PyTorch dtype."""

_DTYPE_NAMES = frozenset(SAFETENSORS_DTYPES.values())
Shapes = dict[str, tuple[int, ...]]
"""Shapes of tensors by name."""


@contextlib.contextmanager
def open_file(path: Path, error: type[HomebrewError]) -> Iterator[tuple[io.BufferedReader, int]]:
    """Open a regular file, not a symbolic link, and yield it with its size in bytes."""
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            yield file, file.seek(0, io.SEEK_END) + file.seek(0)
    except OSError as cause:
        rule = "It must be a regular file with read permission."
        if cause.errno == errno.EMFILE:  # each mapped file stays open
            rule = "Raise the limit of the shell with `ulimit -n 4096`, or use fewer and larger files."
        raise error(f"{path} cannot be read: {cause.strerror}. {rule}") from cause


def read_bytes(path: Path, error: type[HomebrewError]) -> bytes:
    """Read a file of at most `MAX_BYTES`."""
    with open_file(path, error) as (file, size):
        if size > MAX_BYTES:
            raise error(f"{path} has {size:,} bytes; at most {MAX_BYTES:,} are expected.")
        return file.read(size)


def read_json(path: Path, error: type[HomebrewError]) -> dict[str, Any]:
    """Read a JSON object from a file of at most `MAX_BYTES`."""
    return parse_json(read_bytes(path, error), path, error)


def parse_json(data: bytes, source: Path | str, error: type[HomebrewError]) -> dict[str, Any]:
    """Parse a JSON object, UTF-8. `source` names it in error messages."""
    if len(data) > MAX_BYTES:
        raise error(f"{source} has {len(data):,} bytes; at most {MAX_BYTES:,} are expected.")
    # Every value but the first follows one of these characters, so counting them limits the values without parsing.
    if sum(map(data.count, (b"[", b"{", b",", b":"))) > MAX_JSON_VALUES:
        raise error(f"{source} has more than {MAX_JSON_VALUES:,} JSON values; at most that many are expected.")
    try:
        value = json.loads(data.decode(), object_pairs_hook=_unique_keys)
        _check_depth(value)
    except (ValueError, RecursionError) as cause:
        raise error(f"{source} is not valid JSON: {cause}.") from cause
    if not isinstance(value, dict):
        raise error(f"{source} must contain a JSON object, but contains a {type(value).__name__}.")
    return value


def parse_tensors(data: bytes, path: Path, error: type[HomebrewError]) -> "dict[str, Tensor]":
    """Parse a safetensors file."""
    from safetensors.torch import load  # imports PyTorch

    read_header(io.BytesIO(data), path, error)
    with _safetensors_errors(path, error):
        return load(data)


@contextlib.contextmanager
def open_tensors(path: Path, error: type[HomebrewError]) -> Iterator[tuple[Any, Shapes]]:
    """Open a safetensors file without reading its tensors, and yield its `safe_open` handle and the shapes."""
    with open_file(path, error) as (file, _):
        shapes = read_header(file, path, error)
    with _safetensors_errors(path, error), safe_open(path, framework="pt") as tensors:
        yield tensors, shapes


def read_header(file: BinaryIO, path: Path, error: type[HomebrewError]) -> Shapes:
    """Read the shapes of a safetensors file and check its limits; the safetensors library checks the offsets."""
    num_bytes = int.from_bytes(file.read(8), "little")
    if num_bytes > MAX_BYTES:
        raise error(f"{path} is not a safetensors file: a header of {num_bytes:,} bytes is too long.")
    header = parse_json(file.read(num_bytes), f"The header of {path}", error)
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise error(f"{path} has {len(header):,} tensors; at most {MAX_TENSORS:,} are supported.")
    shapes = {}
    for name, entry in header.items():
        match entry:
            case {"dtype": str(dtype), "shape": list(shape)} if dtype in _DTYPE_NAMES and len(shape) <= MAX_RANK:
                shapes[name] = tuple(shape)
            case _:
                raise error(
                    f"The header of {path} has an entry for {name:.100} that is not supported: {entry!r:.200}. "
                    f"Supported are the dtypes {', '.join(sorted(_DTYPE_NAMES))}, and at most {MAX_RANK} dimensions."
                )
    return shapes


@contextlib.contextmanager
def _safetensors_errors(path: Path, error: type[HomebrewError]) -> Iterator[None]:
    try:
        yield
    # The library raises not only its own error, but also PyTorch's, for example for shapes such as (0, 2**62).
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AssertionError, RuntimeError) as cause:
        if isinstance(cause, HomebrewError):
            raise
        reason = str(cause).partition("\n")[0]
        raise error(f"{path} is not a valid safetensors file: {reason}. Copy or download it again.") from cause


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Reject duplicate keys: one flipped bit can make two keys equal, and `json` would silently drop the first."""
    if len(value := dict(pairs)) < len(pairs):
        raise ValueError("an object has a duplicate key")
    return value


def _check_depth(value: object) -> None:
    """Reject deep nesting, on which recursive functions such as `repr` fail."""
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        if not level:
            return
        parents = [item for item in level if isinstance(item, dict | list)]
        level = [child for item in parents for child in (item.values() if isinstance(item, dict) else item)]
    if level:
        raise ValueError(f"it is nested more than {MAX_JSON_DEPTH} levels deep")
