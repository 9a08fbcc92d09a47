"""Where a dataset's tokens are: in memory, or in files."""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from homebrew.data.token_file import TokenFile


class Tokens(Protocol):
    """Token ids, counted from 0."""

    @property
    def device(self) -> torch.device:
        """Where windows come out."""

    @property
    def digest(self) -> str:
        """Of the ids, in hexadecimal: equal digests, equal ids."""

    def __len__(self) -> int: ...

    def windows(self, starts: Tensor, length: int) -> Tensor:
        """The `length` ids from each of `starts`, (B,), int64, on: (B, length), int64."""

    def to(self, device: torch.device) -> "Tokens":
        """The same ids on another device."""


class MemoryTokens:
    """Ids in one tensor.

    Args:
        ids: (n,), int32.
        digest: SHA-256 of the ids where it is known.
    """

    def __init__(self, ids: Tensor, digest: str | None = None) -> None:
        self.ids = ids
        if digest is not None:
            self.digest = digest

    @property
    def device(self) -> torch.device:
        """Where the ids are."""
        return self.ids.device

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the ids."""
        return hashlib.sha256(self.ids.cpu().numpy().data).hexdigest()

    def __len__(self) -> int:
        return len(self.ids)

    def windows(self, starts: Tensor, length: int) -> Tensor:
        """The `length` ids from each of `starts` on."""
        offsets = torch.arange(length, device=self.device)
        return self.ids[starts[:, None] + offsets].long()

    def to(self, device: torch.device) -> "MemoryTokens":
        """The same ids on another device."""
        return MemoryTokens(self.ids.to(device), self.__dict__.get("digest"))


class FileTokens:
    """Ids in token files, one after the other; a window is read when it is asked for and lies within one file.

    Args:
        files: open.
    """

    device = torch.device("cpu")

    def __init__(self, files: Sequence[TokenFile]) -> None:
        self.files = files
        *self.firsts, self._num_tokens = accumulate(map(len, files), initial=0)

    @property
    def digest(self) -> str:
        """Of the SHA-256s that the files' headers give."""
        return hashlib.sha256("\n".join(file.header.sha256 for file in self.files).encode()).hexdigest()

    def __len__(self) -> int:
        return self._num_tokens

    def windows(self, starts: Tensor, length: int) -> Tensor:
        """The `length` ids from each of `starts` on.

        Raises:
            DataError: a file can no longer be read, or holds an id outside its vocabulary.
        """
        rows = np.empty((len(starts), length), np.int64)
        for row, start in zip(rows, starts.tolist(), strict=True):
            i = bisect_right(self.firsts, start) - 1
            begin = start - self.firsts[i]
            row[:] = self.files[i].read(begin, begin + length)
        return torch.from_numpy(rows)

    def to(self, device: torch.device) -> "MemoryTokens | FileTokens":
        """The ids in memory there, or these files where that is the CPU."""
        if device.type == "cpu":
            return self
        ids = np.concatenate([file.read(0, len(file)).astype(np.int32) for file in self.files])
        return MemoryTokens(torch.from_numpy(ids).to(device), self.digest)
