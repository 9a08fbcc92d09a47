"""Token windows: what a model trains on."""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from homebrew.data.tokenizer import Tokenizer, get_tokenizer
from homebrew.errors import DataError

Pair = tuple[Tensor, Tensor]


class TokenDataset(Dataset[Pair]):
    """Windows of `block_size + 1` consecutive tokens: all but the last are the input, all but the first the targets.

    Made by `from_text`, `from_file` or `from_tokens`.

    Args:
        tokens: all of them, (n,), any integer dtype.
        starts: where each window starts, (number of windows,), int64.
        block_size: tokens in an input.
        vocab_size: ids that may occur.
        tokenizer: what made the tokens, for samples to decode.
        num_text_bytes: UTF-8 bytes of the text the tokens stand for.
        source: where the text came from, in words.
    """

    def __init__(
        self,
        tokens: Tensor,
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
        self._offsets = torch.arange(block_size + 1, device=tokens.device)

    @classmethod
    def from_text(
        cls,
        text: str,
        block_size: int,
        *,
        tokenizer: str | Tokenizer = "gpt2",
        stride: int | None = None,
        source: str | None = None,
    ) -> Self:
        """Windows over a text.

        Args:
            text: what to learn.
            block_size: tokens in an input.
            tokenizer: "gpt2", "bytes", "char" (the text's own characters), or one of your own.
            stride: tokens between the starts of windows; `block_size`, so that each is a target once, if None.
            source: where the text came from, in words, for the run's record.

        Raises:
            DataError: the text is empty or shorter than one window.
        """
        if not text:
            raise DataError("The text is empty: there is nothing to train on.")
        chosen = get_tokenizer(tokenizer, text=text) if isinstance(tokenizer, str) else tokenizer
        made = cls.from_tokens(
            chosen.encode(text), block_size, vocab_size=chosen.vocab_size, tokenizer=chosen, stride=stride
        )
        made.num_text_bytes = len(text.encode())
        made.source = source
        return made

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        block_size: int,
        *,
        tokenizer: str | Tokenizer = "gpt2",
        stride: int | None = None,
    ) -> Self:
        """Windows over a UTF-8 text file.

        Args:
            path: the file.
            block_size: tokens in an input.
            tokenizer: as in `from_text`.
            stride: as in `from_text`.

        Raises:
            DataError: the file cannot be read as UTF-8 text, or is too short.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"{str(path)!r} cannot be read as UTF-8 text: {error}. Give a text file."
            ) from error
        return cls.from_text(text, block_size, tokenizer=tokenizer, stride=stride, source=f"the file {path}")

    @classmethod
    def from_tokens(
        cls,
        ids: Tensor | NDArray[np.integer] | Sequence[int],
        block_size: int,
        *,
        vocab_size: int | None = None,
        tokenizer: Tokenizer | None = None,
        stride: int | None = None,
    ) -> Self:
        """Windows over token ids.

        Args:
            ids: (n,), integers.
            block_size: tokens in an input.
            vocab_size: ids that may occur; one more than the largest if None.
            tokenizer: what made them, for samples to decode.
            stride: as in `from_text`.

        Raises:
            DataError: there are fewer than one window's, or one is outside the vocabulary.
        """
        tokens = torch.as_tensor(ids)
        if (
            tokens.dim() != 1
            or tokens.is_floating_point()
            or tokens.is_complex()
            or tokens.dtype == torch.bool
        ):
            raise DataError(
                f"Token ids must be integers in one row; got {tokens.dtype} of shape {tuple(tokens.shape)}."
            )
        stride = block_size if stride is None else stride
        if block_size < 1 or stride < 1:
            raise DataError(f"block_size={block_size} and stride={stride}: both must be at least 1.")
        if len(tokens) < block_size + 1:
            raise DataError(
                f"There are {len(tokens)} tokens, but one window takes block_size + 1 = {block_size + 1}: give more "
                f"text, or a smaller block_size."
            )
        low, high = int(tokens.min()), int(tokens.max())
        vocab_size = high + 1 if vocab_size is None else vocab_size
        if low < 0 or high >= vocab_size:
            outside = low if low < 0 else high
            raise DataError(
                f"Token id {outside} is outside the vocabulary of {vocab_size} (0 to {vocab_size - 1}): use the "
                f"tokenizer that made the ids, or give its vocab_size."
            )
        # The smallest dtype that indexing and CUDA kernels both know.
        tokens = tokens.to(torch.int32)
        starts = torch.arange(0, len(tokens) - block_size, stride)
        return cls(tokens, starts, block_size=block_size, vocab_size=vocab_size, tokenizer=tokenizer)

    def split(self, fraction: float, *, seed: int | None = 42) -> tuple[Self, Self]:
        """Two datasets over the same tokens, the first with `fraction` of the windows.

        Args:
            fraction: between 0 and 1.
            seed: of the shuffle that deals out the windows; None cuts the text in two instead, which overlapping
                windows need.

        Raises:
            DataError: a part would be empty, or overlapping windows would put one's text into the other.
        """
        windows = len(self)
        first = int(windows * fraction)
        if not 0 < first < windows:
            raise DataError(
                f"fraction={fraction!r} of {windows} windows leaves a part without any: it must be between 0 and 1, "
                f"and there must be enough text for both."
            )
        if seed is None:
            border = self.starts[first]
            before = self.starts[:first]
            before = before[before + self.block_size <= border]
            return self._over(before), self._over(self.starts[first:])
        if bool((self.starts.diff().abs() < self.block_size).any()):
            raise DataError(
                "These windows overlap, so a shuffled split would train on what it evaluates: use "
                "split(fraction, seed=None), which cuts the text in two."
            )
        order = torch.randperm(windows, generator=torch.Generator().manual_seed(seed))
        return self._over(self.starts[order[:first]]), self._over(self.starts[order[first:]])

    def _over(self, starts: Tensor) -> Self:
        return type(self)(
            self.tokens,
            starts,
            block_size=self.block_size,
            vocab_size=self.vocab_size,
            tokenizer=self.tokenizer,
            num_text_bytes=self.num_text_bytes,
            source=self.source,
        )

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Pair:
        input_ids, targets = self.batch(torch.tensor([index], device=self.tokens.device))
        return input_ids[0], targets[0]

    def batch(self, indices: Tensor) -> Pair:
        """The windows at `indices`, (B,), int64, where the tokens are: input_ids and targets, (B, T), int64."""
        windows = self.tokens[self.starts[indices][:, None] + self._offsets].long()  # (B, T + 1)
        return windows[:, :-1], windows[:, 1:]

    def to(self, device: torch.device) -> Self:
        """The same dataset with its tokens on another device."""
        moved = self._over(self.starts.to(device))
        moved.tokens = self.tokens.to(device)
        moved._offsets = self._offsets.to(device)
        return moved

    @property
    def num_tokens(self) -> int:
        """Targets in all windows."""
        return len(self) * self.block_size

    @property
    def nbytes(self) -> int:
        """Memory the tokens and windows take."""
        return self.tokens.nbytes + self.starts.nbytes

    @property
    def bytes_per_token(self) -> float | None:
        """UTF-8 bytes a token stands for, over the whole text; for bits per byte."""
        return None if self.num_text_bytes is None else self.num_text_bytes / len(self.tokens)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over tokens, windows and `block_size`: two datasets with the same one give the same samples."""
        digest = hashlib.sha256(f"{self.block_size} {len(self.tokens)} {len(self)}\n".encode())
        for part in (self.tokens, self.starts):
            digest.update(part.cpu().contiguous().numpy())
        return digest.hexdigest()
