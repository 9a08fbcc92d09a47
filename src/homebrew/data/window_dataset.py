"""`WindowDataset`: fixed-length windows over a sequence of token ids."""

import copy
import hashlib
import operator
from functools import cached_property
from typing import Self, overload

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from homebrew.data.samples import Sample
from homebrew.data.token_source import TokenSource
from homebrew.data.tokenizer import Tokenizer
from homebrew.data.windows import split_starts
from homebrew.errors import DataError


class WindowDataset(Dataset[Sample]):
    """Windows of `block_size + 1` consecutive tokens. The inputs omit the last token, the targets the first.

    Args:
        tokens: Source of the token ids.
        starts: Position of the first token of each window, (num_windows,), int64.
        block_size: Sequence length of the inputs, in tokens.
        vocab_size: Size of the vocabulary; all token ids are below it.
        tokenizer: Tokenizer that made the token ids.
        num_text_bytes: Size of the text in UTF-8 bytes.
        source: Description of the text's origin.
    """

    def __init__(
        self,
        tokens: TokenSource,
        starts: Tensor,
        *,
        block_size: int,
        vocab_size: int,
        tokenizer: Tokenizer | None = None,
        num_text_bytes: int | None = None,
        source: str | None = None,
    ) -> None:
        self.tokens = tokens
        self.starts = starts
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.tokenizer = tokenizer
        self.num_text_bytes = num_text_bytes
        self.source = source

    def split(self, fraction: float, *, seed: int | None = 42) -> tuple[Self, Self]:
        """Split the windows into two datasets that share the tokens.

        Args:
            fraction: Fraction of the windows in the first dataset, between 0 and 1.
            seed: Random seed for distributing the windows. If None the text is cut in two instead, which is required
                for overlapping windows.

        Raises:
            DataError: If a dataset would be empty, or the windows overlap and `seed` is not None.
        """
        first, second = split_starts(self.starts, self.block_size, fraction, seed)
        return self._with_starts(first), self._with_starts(second)

    def __repr__(self) -> str:
        tokenizer = self.tokenizer and self.tokenizer.name
        return (
            f"{type(self).__name__}({len(self):,} windows of block_size={self.block_size}, "
            f"vocab_size={self.vocab_size}, tokenizer={tokenizer!r}, source={self.source!r})"
        )

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> Self: ...

    def __getitem__(self, index: int | slice) -> Sample | Self:
        """Return a sample or, for a slice, a dataset of the windows in the slice, which shares the tokens."""
        if isinstance(index, slice):
            indices = np.arange(*index.indices(len(self)))  # a tensor's slice has no negative steps
            return self._with_starts(self.starts[torch.from_numpy(indices).to(self.device)])
        try:
            index = operator.index(index)
        except TypeError:
            raise DataError(
                f"{index!r:.100} is not the index of a sample. Use an integer, a slice, or "
                f"torch.utils.data.Subset(dataset, indices) for several."
            ) from None
        input_ids, targets = self.batch(torch.tensor([index], device=self.device))
        return input_ids[0], targets[0]

    def batch(self, indices: Tensor) -> Sample:
        """Return a batch of windows on the dataset's device.

        Args:
            indices: Indices of the windows, (B,), int64, on the same device.

        Returns:
            `input_ids` and `targets`, each (B, block_size), int64.
        """
        windows = self.tokens.windows(self.starts[indices], self.block_size + 1)
        # Contiguous copies instead of views: torch.compile would compile the model once for each stride.
        input_ids = windows[:, :-1].clone(memory_format=torch.contiguous_format)
        targets = windows[:, 1:].clone(memory_format=torch.contiguous_format)
        return input_ids, targets

    def to(self, device: torch.device) -> Self:
        """Return the dataset with its tokens on another device."""
        moved = self._with_starts(self.starts.to(device))
        moved.tokens = self.tokens.to(device)
        return moved

    @property
    def device(self) -> torch.device:
        """Device of the batches."""
        return self.tokens.device

    @property
    def num_tokens(self) -> int:
        """Number of targets in all windows."""
        return len(self) * self.block_size

    @property
    def nbytes(self) -> int:
        """Memory that the dataset needs on a device, in bytes."""
        return 4 * len(self.tokens) + self.starts.nbytes

    @property
    def bytes_per_token(self) -> float | None:
        """Average UTF-8 bytes per token, which converts the loss to bits per byte. None if unknown."""
        return None if self.num_text_bytes is None else self.num_text_bytes / len(self.tokens)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the tokens, the windows and `block_size`. Datasets with equal fingerprints have equal samples.

        For large files without metadata, such as nanoGPT's, the hash depends on only a part of the tokens.
        """
        digest = hashlib.sha256(f"{self.block_size} {len(self.tokens)} {len(self)} {self.tokens.digest}\n".encode())
        digest.update(self.starts.cpu().numpy().data)
        return digest.hexdigest()

    def _with_starts(self, starts: Tensor) -> Self:
        other = copy.copy(self)  # keeps the attributes of a subclass
        other.__dict__.pop("fingerprint", None)
        other.starts = starts
        return other
