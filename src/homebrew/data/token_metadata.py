"""The metadata of a token file, in a JSON file beside it."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from homebrew.bounded_readers import parse_json, read_bytes
from homebrew.errors import DataError
from homebrew.io import strict_json

FORMAT_VERSION = 1
REMEDY = "Restore both files, or run `homebrew prepare` again."
"""Advice for errors about an invalid token file."""

_FIELD_TYPES: dict[str, Any] = {
    "vocab_size": int,
    "num_tokens": int,
    "num_text_bytes": int | None,
    "tokenizer": dict | None,
    "source": str | None,
    "sha256": str,
}


def metadata_path(path: Path) -> Path:
    """Return the path of the JSON file that belongs to a `.npy` file."""
    return path.with_suffix(".json")


@dataclass(frozen=True)
class TokenMetadata:
    """Contents of a token file's JSON file."""

    vocab_size: int
    """Size of the vocabulary; all token ids are below it."""
    num_tokens: int
    """Length of the array."""
    num_text_bytes: int | None
    """Size of the text in UTF-8 bytes, or None if unknown."""
    tokenizer: dict[str, Any] | None
    """Description of the tokenizer (`Tokenizer.to_json`), or None if unknown."""
    source: str | None
    """Description of the text's origin, or None if unknown."""
    sha256: str | None
    """SHA-256 of the `.npy` file, in hexadecimal; None for a file of another program, which has no JSON file."""

    def to_json(self) -> str:
        """Return the text of the JSON file."""
        fields = {"format_version": FORMAT_VERSION, **asdict(self)}
        sha256 = hashlib.sha256(strict_json(fields, sort_keys=True).encode()).hexdigest()
        return strict_json(fields | {"metadata_sha256": sha256}, indent=2) + "\n"

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read and validate a JSON file. It must be what `to_json` returns, so that no changed byte goes unnoticed."""
        return cls.parse(read_bytes(path, DataError), path)

    @classmethod
    def parse(cls, data: bytes, path: Path) -> Self:
        """Validate the contents of the JSON file `path`."""
        fields = parse_json(data, path, DataError)
        version = fields.pop("format_version", None)
        if version is None or fields.pop("metadata_sha256", None) is None:
            raise DataError(f"{path} is not the metadata of a token file. {REMEDY}")
        if version != FORMAT_VERSION:
            raise DataError(
                f"{path} has format version {version!r}, but this version of homebrew reads {FORMAT_VERSION}. Run "
                f"`homebrew prepare` again."
            )
        if fields.keys() != _FIELD_TYPES.keys():
            raise DataError(f"{path} must have the fields {', '.join(_FIELD_TYPES)}. {REMEDY}")
        try:
            _check_types(fields)
        except DataError as error:
            raise DataError(f"{path} is not valid: {error} {REMEDY}") from error
        metadata = cls(**fields)
        if metadata.to_json().encode() != data:
            raise DataError(f"{path} was modified: its contents do not match its metadata_sha256. {REMEDY}")
        return metadata

    def check(self, path: Path) -> None:
        """Check that the metadata could be read again after writing them to the JSON file `path`."""
        _check_types(vars(self))
        try:
            self.parse(self.to_json().encode(), path)
        except (TypeError, RecursionError) as error:
            raise DataError(
                f"tokenizer_json cannot be written as JSON: {error}. Use strings, numbers and lists."
            ) from error


def _check_types(fields: Mapping[str, Any]) -> None:
    """Check the types of a `TokenMetadata`'s fields."""
    for name, types in _FIELD_TYPES.items():
        value = fields[name]
        if not isinstance(value, types) or isinstance(value, bool):
            expected = getattr(types, "__name__", types)
            raise DataError(f"{name}={value!r:.200} is of type {type(value).__name__}, but must be {expected}.")
