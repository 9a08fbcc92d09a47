"""`TokenDataset`: fixed-length windows over a sequence of token ids."""

import copy
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from homebrew.data.samples import Sample
from homebrew.data.text_column import column_of_texts
from homebrew.data.text_file import read_text
from homebrew.data.text_paths import Paths, describe_files, expand_paths
from homebrew.data.token_formats import is_token_file
from homebrew.data.token_ids import MAX_VOCAB_SIZE, as_token_ids, check_token_ids
from homebrew.data.token_source import FileTokens, MemoryTokens, TokenSource
from homebrew.data.tokenizer import Tokenizer, get_tokenizer
from homebrew.data.utf8 import encode_utf8
from homebrew.data.windows import check_not_empty, split_starts, window_starts
from homebrew.errors import DataError
from homebrew.integers import as_integer


class TokenDataset(Dataset[Sample]):
    """Windows of `block_size + 1` consecutive tokens. The inputs omit the last token, the targets the first.

    Use `from_text`, `from_file`, `from_dataset`, `from_tokens` or `from_shards` to create a dataset.

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

    @classmethod
    def from_text(
        cls,
        text: str | Iterable[str],
        block_size: int,
        *,
        tokenizer: str | Path | Tokenizer = "gpt2",
        stride: int | None = None,
        source: str | None = None,
    ) -> Self:
        """Create a dataset from a text.

        Args:
            text: Training text, or several, separated by the tokenizer's end-of-text token if it has one.
            block_size: Sequence length of the inputs, in tokens.
            tokenizer: "gpt2", "bytes", "char" (the characters that occur in the text), the path of a `tokenizer.json`,
                or a custom tokenizer.
            stride: Distance between the starts of consecutive windows, in tokens. If None it is `block_size`, so that
                every token is a target at most once.
            source: Description of the text's origin, stored in the run's metadata.

        Raises:
            DataError: If the text is empty, shorter than one window, or not valid Unicode.
        """
        if not isinstance(text, Iterable):
            raise DataError(f"The text is of type {type(text).__name__}, but must be a string, or several.")
        texts = [text] if isinstance(text, str) else list(text)
        if not any(texts):
            raise DataError("The text is empty. Give a text to train on.")
        num_text_bytes = sum(len(encode_utf8(text)) for text in texts)
        if isinstance(tokenizer, str | Path):
            tokenizer = get_tokenizer(tokenizer, text="".join(texts))
        end = tokenizer.end_of_text_id
        separator = np.array([] if end is None else [end], dtype=np.int64)
        _, *parts = [part for text in texts for part in (separator, tokenizer.encode(text))]
        dataset = cls.from_tokens(
            np.concatenate(parts), block_size, vocab_size=tokenizer.vocab_size, tokenizer=tokenizer, stride=stride
        )
        dataset.num_text_bytes = num_text_bytes
        dataset.source = source
        return dataset

    @classmethod
    def from_file(
        cls,
        path: Paths,
        block_size: int,
        *,
        tokenizer: str | Path | Tokenizer | None = None,
        stride: int | None = None,
        check: bool = False,
    ) -> Self:
        """Create a dataset from text files, or from token files without loading them into memory.

        Token files are those of `homebrew prepare` (`.npy`), nanoGPT's `train.bin`, and llm.c's `.bin` shards. They are
        recognised by their content. Text files are tokenized as by `homebrew prepare`.

        Args:
            path: Path of a file, of a folder, of which all .npy files or, if it has none, all .txt files are read, a
                pattern such as "fineweb/train_*.bin", or a sequence of them.
            block_size: Sequence length of the inputs, in tokens.
            tokenizer: For text files, as in `from_text`; "gpt2" if None. For token files it is only needed for
                nanoGPT's, which do not say which tokenizer made them.
            stride: As in `from_text`.
            check: As in `from_shards`, for token files.

        Raises:
            DataError: If a file is neither UTF-8 text nor a valid token file, a folder has no such files, or the
                files are shorter than one window.
        """
        files = expand_paths(path, ".npy", ".txt")
        if any(map(is_token_file, files)):
            return cls.from_shards(files, block_size, tokenizer=tokenizer, stride=stride, check=check)
        texts = [read_text(file) for file in files]
        tokenizer = "gpt2" if tokenizer is None else tokenizer
        return cls.from_text(texts, block_size, tokenizer=tokenizer, stride=stride, source=describe_files(files))

    @classmethod
    def from_dataset(
        cls,
        dataset: Dataset[Any] | Iterable[Mapping[str, Any]],
        block_size: int,
        *,
        text_column: str = "text",
        tokenizer: str | Path | Tokenizer = "gpt2",
        stride: int | None = None,
    ) -> Self:
        """Create a dataset from the texts of another one, such as a Hugging Face `datasets.Dataset`.

        The texts are separated as in `from_text`, and tokenized into memory. For more text than that, use `homebrew
        prepare` and `from_shards`.

        Args:
            dataset: Map-style or iterable dataset of dictionaries.
            block_size: Sequence length of the inputs, in tokens.
            text_column: Key of the text in each dictionary.
            tokenizer: As in `from_text`.
            stride: As in `from_text`.

        Raises:
            DataError: If a row has no text in that column, or the texts are shorter than one window.
        """
        texts = column_of_texts(dataset, text_column)
        source = f"column {text_column!r} of a {type(dataset).__name__} with {len(texts)} rows"
        return cls.from_text(texts, block_size, tokenizer=tokenizer, stride=stride, source=source)

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
        """Create a dataset from token ids. The ids are copied.

        Args:
            ids: Token ids, (num_tokens,), integers.
            block_size: Sequence length of the inputs, in tokens.
            vocab_size: Size of the vocabulary. If None it is the largest id plus 1.
            tokenizer: Tokenizer that made the ids.
            stride: As in `from_text`.

        Raises:
            DataError: If there are fewer ids than one window needs, or an id is outside the vocabulary.
        """
        array = as_token_ids(ids)
        starts = window_starts(len(array), block_size, stride)
        check_not_empty(starts, len(array), block_size)
        vocab_size = as_integer(
            "vocab_size", int(array.max()) + 1 if vocab_size is None else vocab_size, 1, MAX_VOCAB_SIZE, error=DataError
        )
        check_token_ids(array, vocab_size)
        # int32 is the smallest dtype that both PyTorch's indexing and the CUDA kernels support.
        tokens = MemoryTokens(torch.from_numpy(array.astype(np.int32)))
        return cls(tokens, starts, block_size=block_size, vocab_size=vocab_size, tokenizer=tokenizer)

    @classmethod
    def from_shards(
        cls,
        paths: Paths,
        block_size: int,
        *,
        tokenizer: str | Path | Tokenizer | None = None,
        stride: int | None = None,
        check: bool = True,
    ) -> Self:
        """Create a dataset from token files, without loading them into memory. No window spans two files.

        Args:
            paths: Path of a token file (see `from_file`), of a folder, of which all .npy files are read, a pattern such
                as "fineweb/train_*.bin", or a sequence of them.
            block_size: Sequence length of the inputs, in tokens.
            tokenizer: Tokenizer that made the tokens, or its name. If None it is the one that the files name.
            stride: As in `from_text`.
            check: Whether to read each .npy file once and compare its SHA-256 with its metadata.

        Raises:
            DataError: If a file is not a valid token file, the files have different vocabularies or tokenizers, or no
                file is as long as one window.
        """
        tokens = FileTokens.open(expand_paths(paths, ".npy"), tokenizer=tokenizer, check=check)
        files, metadata = tokens.files, tokens.files[0].metadata
        starts_by_file = [
            offset + window_starts(len(file), block_size, stride)
            for offset, file in zip(tokens.offsets, files, strict=True)
        ]
        starts = torch.cat(starts_by_file)
        check_not_empty(starts, max(map(len, files)), block_size)
        sizes = [file.metadata.num_text_bytes for file in files]
        origin = f" (from {metadata.source})" if metadata.source else ""
        return cls(
            tokens,
            starts,
            block_size=block_size,
            vocab_size=metadata.vocab_size,
            tokenizer=tokens.tokenizer,
            num_text_bytes=None if None in sizes else sum(filter(None, sizes)),
            source=describe_files([file.path for file in files], kind="token file") + origin,
        )

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

    def __getitem__(self, index: int) -> Sample:
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

        Of large files without metadata, such as nanoGPT's, it depends on a part of the tokens only.
        """
        digest = hashlib.sha256(f"{self.block_size} {len(self.tokens)} {len(self)} {self.tokens.digest}\n".encode())
        digest.update(self.starts.cpu().numpy().data)
        return digest.hexdigest()

    def _with_starts(self, starts: Tensor) -> Self:
        other = copy.copy(self)  # with the attributes of a subclass
        other.__dict__.pop("fingerprint", None)
        other.starts = starts
        return other
