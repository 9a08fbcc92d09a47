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

from homebrew.data.text_file import read_text
from homebrew.data.token_file import MAX_VOCAB_SIZE, TokenFile
from homebrew.data.token_source import FileTokens, MemoryTokens, Tokens
from homebrew.data.tokenizer import Tokenizer, encode_utf8, get_tokenizer, tokenizer_from_json
from homebrew.errors import DataError

Pair = tuple[Tensor, Tensor]


class TokenDataset(Dataset[Pair]):
    """Windows of `block_size + 1` consecutive tokens: all but the last are the input, all but the first the targets.

    Made by `from_text`, `from_file`, `from_tokens` or `from_shards`.

    Args:
        tokens: in memory or in files.
        starts: where each window starts, (number of windows,), int64.
        block_size: tokens in an input.
        vocab_size: ids that may occur.
        tokenizer: what made the tokens, for samples to decode.
        num_text_bytes: UTF-8 bytes of the text the tokens stand for.
        source: where the text came from, in words.
    """

    def __init__(
        self,
        tokens: Tokens,
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
            DataError: the text is empty or shorter than one window, or no Unicode.
        """
        if not text:
            raise DataError("The text is empty: there is nothing to train on.")
        num_text_bytes = len(encode_utf8(text))
        chosen = get_tokenizer(tokenizer, text=text) if isinstance(tokenizer, str) else tokenizer
        made = cls.from_tokens(
            chosen.encode(text), block_size, vocab_size=chosen.vocab_size, tokenizer=chosen, stride=stride
        )
        made.num_text_bytes = num_text_bytes
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
        text = read_text(path)
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
        tokens = _as_ids(ids)
        starts = _starts(len(tokens), block_size, stride)
        _refuse_if_none(starts, len(tokens), block_size)
        low, high = int(tokens.min()), int(tokens.max())
        vocab_size = high + 1 if vocab_size is None else vocab_size
        if low < 0 or high >= min(vocab_size, MAX_VOCAB_SIZE):
            outside = low if low < 0 else high
            raise DataError(
                f"Token id {outside} is outside the vocabulary of {vocab_size} (0 to {vocab_size - 1}): use the "
                f"tokenizer that made the ids, or give its vocab_size."
            )
        # The smallest dtype that indexing and CUDA kernels both know; a copy, which nobody else can change.
        memory = MemoryTokens(torch.from_numpy(tokens.astype(np.int32)))
        return cls(memory, starts, block_size=block_size, vocab_size=vocab_size, tokenizer=tokenizer)

    @classmethod
    def from_shards(
        cls,
        paths: str | Path | Sequence[str | Path],
        block_size: int,
        *,
        tokenizer: Tokenizer | None = None,
        stride: int | None = None,
        check: bool = True,
    ) -> Self:
        """Windows over token files, read by position: the tokens need not fit into memory.

        A window lies within one file; what a file has too little of for a window is left out.

        Args:
            paths: one file that `homebrew prepare` or `write_tokens` wrote, or several.
            block_size: tokens in an input.
            tokenizer: what made the tokens; the one that the files name if None.
            stride: as in `from_text`.
            check: read each file once now and compare its SHA-256 with its header's; the fingerprint rests on it.

        Raises:
            DataError: a file is not a whole token file, they have different vocabularies or tokenizers, or no file
                has as much as a window.
        """
        files = [TokenFile.open(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
        if not files:
            raise DataError("There are no token files: give the path of at least one.")
        first = files[0].header
        for file in files:
            for name in ("vocab_size", "tokenizer"):
                theirs, ours = getattr(file.header, name), getattr(first, name)
                if theirs != ours:
                    raise DataError(
                        f"{file.path} has {name}={theirs!r:.100}, {files[0].path} has {ours!r:.100}: prepare all "
                        f"files with one tokenizer."
                    )
            if check:
                file.check()
        if tokenizer is None and first.tokenizer is not None:
            tokenizer = tokenizer_from_json(first.tokenizer)
        tokens = FileTokens(files)
        starts = torch.cat(
            [start + _starts(len(file), block_size, stride) for start, file in zip(tokens.firsts, files, strict=True)]
        )
        _refuse_if_none(starts, max(map(len, files)), block_size)
        sizes = [file.header.num_text_bytes for file in files]
        more = f" and {len(files) - 1} more" if len(files) > 1 else ""
        return cls(
            tokens,
            starts,
            block_size=block_size,
            vocab_size=first.vocab_size,
            tokenizer=tokenizer,
            num_text_bytes=None if None in sizes else sum(filter(None, sizes)),
            source=f"the token file {files[0].path}{more}" + (f" (from {first.source})" if first.source else ""),
        )

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
        empty = DataError(
            f"fraction={fraction!r} of {windows} windows leaves a part without any: it must be between 0 and 1, "
            f"and there must be enough text for both."
        )
        first = round(windows * fraction) if 0 < fraction < 1 else 0
        if not 0 < first < windows:
            raise empty
        if seed is None:
            in_order = self.starts.sort().values
            before, after = in_order[:first], in_order[first:]
            before = before[before + self.block_size <= after[0]]
            if not len(before):
                raise empty
            return self._over(before), self._over(after)
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
        input_ids, targets = self.batch(torch.tensor([index], device=self.device))
        return input_ids[0], targets[0]

    def batch(self, indices: Tensor) -> Pair:
        """The windows at `indices`, (B,), int64, where the tokens are: input_ids and targets, (B, T), int64."""
        windows = self.tokens.windows(self.starts[indices], self.block_size + 1)
        # Copies: a copy to another device has other strides than a view, for which a model would be compiled anew.
        whole = torch.contiguous_format
        return windows[:, :-1].clone(memory_format=whole), windows[:, 1:].clone(memory_format=whole)

    def to(self, device: torch.device) -> Self:
        """The same dataset with its tokens on another device."""
        moved = self._over(self.starts.to(device))
        moved.tokens = self.tokens.to(device)
        return moved

    @property
    def device(self) -> torch.device:
        """Where batches come out."""
        return self.tokens.device

    @property
    def num_tokens(self) -> int:
        """Targets in all windows."""
        return len(self) * self.block_size

    @property
    def nbytes(self) -> int:
        """Memory the tokens and windows take on a device."""
        return 4 * len(self.tokens) + self.starts.nbytes

    @property
    def bytes_per_token(self) -> float | None:
        """UTF-8 bytes a token stands for, over the whole text; for bits per byte."""
        return None if self.num_text_bytes is None else self.num_text_bytes / len(self.tokens)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over tokens, windows and `block_size`: two datasets with the same one give the same samples."""
        digest = hashlib.sha256(f"{self.block_size} {len(self.tokens)} {len(self)} {self.tokens.digest}\n".encode())
        digest.update(self.starts.cpu().numpy().data)
        return digest.hexdigest()


def _as_ids(ids: Tensor | NDArray[np.integer] | Sequence[int]) -> NDArray[np.integer]:
    try:
        array = ids.cpu().numpy() if isinstance(ids, Tensor) else np.asarray(ids)
    except (TypeError, ValueError) as error:
        raise DataError(f"Token ids must be integers in one row: {error}.") from error
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise DataError(f"Token ids must be integers in one row; got {array.dtype} of shape {array.shape}.")
    return array


def _starts(num_tokens: int, block_size: int, stride: int | None) -> Tensor:
    """Where windows begin, (number of windows,), int64."""
    stride = block_size if stride is None else stride
    if block_size < 1 or stride < 1:
        raise DataError(f"block_size={block_size} and stride={stride}: both must be at least 1.")
    return torch.arange(0, max(0, num_tokens - block_size), stride)


def _refuse_if_none(starts: Tensor, num_tokens: int, block_size: int) -> None:
    if len(starts) == 0:
        raise DataError(
            f"There are {num_tokens} tokens, but one window takes block_size + 1 = {block_size + 1}: give more "
            f"text, or a smaller block_size."
        )
