"""Token sources: a `TokenDataset` reads its windows from memory or from token files."""

import hashlib
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from homebrew.data.token_file import TokenFile
from homebrew.data.token_formats import named_tokenizer
from homebrew.data.tokenizer import Tokenizer, as_tokenizer, is_built_in, tokenizer_from_json
from homebrew.errors import DataError
from homebrew.io import strict_json


class TokenSource(Protocol):
    """Interface of a sequence of token ids. Implement it to read tokens from another format."""

    @property
    def device(self) -> torch.device:
        """Device that `windows` returns tensors on."""

    @property
    def digest(self) -> str:
        """Hash of the ids, in hexadecimal. Sources with equal digests have equal ids."""

    def __len__(self) -> int:
        """Number of token ids."""

    def windows(self, starts: Tensor, length: int) -> Tensor:
        """Return the `length` ids from each of `starts`, (B,), int64, as a tensor (B, length), int64."""

    def to(self, device: torch.device) -> "TokenSource":
        """Return a source of the same ids on another device."""


class MemoryTokens:
    """Token ids in one tensor.

    Args:
        ids: Token ids, (num_tokens,), int32.
        digest: Hash of the ids; their SHA-256 if None.
    """

    def __init__(self, ids: Tensor, digest: str | None = None) -> None:
        self.ids = ids
        self._digest = digest

    @property
    def device(self) -> torch.device:
        """Device of the ids."""
        return self.ids.device

    @property
    def digest(self) -> str:
        """Hash of the ids, in hexadecimal. It is computed once."""
        if self._digest is None:
            self._digest = hashlib.sha256(self.ids.cpu().numpy().data).hexdigest()
        return self._digest

    def __len__(self) -> int:
        return len(self.ids)

    def windows(self, starts: Tensor, length: int) -> Tensor:
        """Return the `length` ids from each of `starts`, (B,), int64, as a tensor (B, length), int64."""
        offsets = torch.arange(length, device=self.device)
        return self.ids[starts[:, None] + offsets].long()

    def to(self, device: torch.device) -> "MemoryTokens":
        """Return a source of the same ids on another device."""
        return MemoryTokens(self.ids.to(device), self._digest)


class FileTokens:
    """Token ids in memory-mapped token files, one after another. Every window must lie within one file."""

    device = torch.device("cpu")

    def __init__(self, files: Sequence[TokenFile], tokenizer: Tokenizer | None = None) -> None:
        self.files = files
        self.tokenizer = tokenizer
        *offsets, self._num_tokens = accumulate(map(len, files), initial=0)
        self.offsets = torch.tensor(offsets)  # (num_files,), position of each file's first token
        self._ids = [file.ids for file in files]

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the files without their ids. Unpickled files map their ids again."""
        return type(self), (self.files, self.tokenizer)

    @classmethod
    def open(cls, paths: Sequence[Path], *, tokenizer: str | Path | Tokenizer | None, check: bool) -> Self:
        """Open token files.

        Args:
            paths: Paths of the files.
            tokenizer: Tokenizer that made the ids, or its name. If None, it is the one that the files name.
            check: Whether to compare the files with the SHA-256s in their metadata.

        Raises:
            DataError: If a file is not a valid token file, or the files have different vocabularies or tokenizers.
        """
        if not paths:
            raise DataError("The list of token files is empty. Give the path of at least one.")
        named = named_tokenizer(paths[0]) if isinstance(tokenizer, str) else None
        if named is not None and tokenizer == named.get("name"):
            tokenizer = None  # use the file's, which has the alphabet of "char"
        elif named is not None and tokenizer == "char":
            raise _other_tokenizer(paths[0], named, "char")
        if tokenizer is not None:
            tokenizer = as_tokenizer(tokenizer)
        vocab_size = None if tokenizer is None else tokenizer.vocab_size
        files = [TokenFile(path, vocab_size) for path in paths]
        metadata = files[0].metadata
        for file in files:
            for name in ("vocab_size", "tokenizer"):
                value, expected = getattr(file.metadata, name), getattr(metadata, name)
                if value != expected:
                    raise DataError(
                        f"{file.path} has {name}={value!r:.100}, but {files[0].path} has {expected!r:.100}. Prepare "
                        f"all files with the same tokenizer."
                    )
            if check:
                file.verify()
        if tokenizer is not None:
            _check_tokenizer(tokenizer, files[0])
        elif metadata.tokenizer is not None:
            if not is_built_in(metadata.tokenizer):
                raise DataError(
                    f"{paths[0]} was made by the custom tokenizer {metadata.tokenizer.get('name')!r}. Pass an object "
                    f"of its class to TokenDataset.from_shards."
                )
            tokenizer = tokenizer_from_json(metadata.tokenizer)
        return cls(files, tokenizer)

    @property
    def digest(self) -> str:
        """Hash of the files' digests."""
        return hashlib.sha256("\n".join(file.digest for file in self.files).encode()).hexdigest()

    def __len__(self) -> int:
        return self._num_tokens

    def windows(self, starts: Tensor, length: int) -> Tensor:
        """Return the `length` ids from each of `starts`, (B,), int64, as a tensor (B, length), int64.

        Raises:
            DataError: If an id is outside the vocabulary.
        """
        # Few operations per window: the overhead of one is larger than the time to copy a thousand ids.
        files = torch.searchsorted(self.offsets, starts, right=True) - 1
        positions = (starts - self.offsets[files]).tolist()
        windows = np.empty((len(starts), length), self._ids[0].dtype)
        for window, file, position in zip(windows, files.tolist(), positions, strict=True):
            window[:] = self._ids[file][position : position + length]
        if windows.size and windows.max() >= self.files[0].metadata.vocab_size:
            for file, position in zip(files.tolist(), positions, strict=True):
                self.files[file].read(position, position + length)  # raises the error
        return torch.from_numpy(windows.astype(np.int64))

    def to(self, device: torch.device) -> "MemoryTokens | FileTokens":
        """Copy the ids to another device's memory. For the CPU, return this source, which reads from the files."""
        if device.type == "cpu":
            return self
        ids = np.concatenate([file.read(0, len(file)).astype(np.int32) for file in self.files])
        return MemoryTokens(torch.from_numpy(ids).to(device), self.digest)


def _other_tokenizer(path: Path, description: dict[str, Any], name: str) -> DataError:
    return DataError(
        f"{path} has the tokenizer {description.get('name')!r}, but {name!r} was given, or one with other tokens. "
        f"Leave the tokenizer out, or give a file that this tokenizer made."
    )


def _check_tokenizer(tokenizer: Tokenizer, file: TokenFile) -> None:
    """Check that a tokenizer is the one that a token file names or, if the file names none, has as many ids."""
    description, vocab_size = file.metadata.tokenizer, file.metadata.vocab_size
    if description is None and tokenizer.vocab_size != vocab_size:
        raise DataError(
            f"{file.path} has a vocabulary of {vocab_size}, but the tokenizer {tokenizer.name!r} has "
            f"{tokenizer.vocab_size} ids. Give the tokenizer that made the file."
        )
    if description is not None and strict_json(description, sort_keys=True) != strict_json(
        tokenizer.to_json(), sort_keys=True
    ):
        raise _other_tokenizer(file.path, description, tokenizer.name)
