"""`TokenDataset`: creates datasets of fixed-length windows from texts, token ids and files."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from homebrew.data.text_column import column_of_texts
from homebrew.data.text_file import read_text
from homebrew.data.text_paths import TEXT_SUFFIXES, Paths, describe_files, expand_paths
from homebrew.data.token_formats import is_token_file
from homebrew.data.token_ids import MAX_VOCAB_SIZE, as_token_ids, check_token_ids
from homebrew.data.token_source import FileTokens, MemoryTokens
from homebrew.data.tokenizer import Tokenizer, as_tokenizer
from homebrew.data.utf8 import encode_utf8
from homebrew.data.window_dataset import WindowDataset
from homebrew.data.windows import check_not_empty, window_starts
from homebrew.errors import DataError
from homebrew.integers import as_integer


class TokenDataset(WindowDataset):
    """A dataset of windows of `block_size + 1` tokens: the inputs omit the last token, the targets the first.

    Use `from_text`, `from_file`, `from_dataset`, `from_tokens` or `from_shards` to create a dataset.
    """

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
            raise DataError(
                f"The text is of type {type(text).__name__}, but must be a string or several strings. "
                f"To read a file, use TokenDataset.from_file."
            )
        texts = [text] if isinstance(text, str | bytes | bytearray) else list(text)
        if not any(texts):
            raise DataError(
                f"There is no text in {source}. Give a text." if source else "The text is empty. Give a text."
            )
        num_text_bytes = sum(len(encode_utf8(text)) for text in texts)
        if len(texts) == 1 and len(texts[0]) < 256 and os.path.isfile(texts[0]):  # noqa: PTH113 - takes any string
            raise DataError(
                f"The text {texts[0]!r} is the path of a file. Use TokenDataset.from_file({texts[0]!r}, …)."
            )
        alphabet_text = "".join(texts) if str(tokenizer) == "char" else None
        tokenizer = as_tokenizer(tokenizer, text=alphabet_text)
        end = tokenizer.end_of_text_id
        separator = np.array([] if end is None else [end], dtype=np.int64)
        _, *parts = [part for text in texts for part in (separator, tokenizer.encode(text))]
        return cls._from_ids(
            np.concatenate(parts),
            block_size,
            vocab_size=tokenizer.vocab_size,
            tokenizer=tokenizer,
            stride=stride,
            num_text_bytes=num_text_bytes,
            source=source,
        )

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
            path: Path of a file, of a folder (all its .npy files or, if it has none, all its .txt and .md files), a
                pattern such as "fineweb/train_*.bin", or a sequence of them.
            block_size: Sequence length of the inputs, in tokens.
            tokenizer: For text files, as in `from_text`; "gpt2" if None. For token files it is only needed for
                nanoGPT's, which do not say which tokenizer made them.
            stride: As in `from_text`.
            check: As in `from_shards`, for token files.

        Raises:
            DataError: If a file is neither UTF-8 text nor a valid token file, a folder has no such files, or has
                data in other formats beside its text files, or the files are shorter than one window.
        """
        files = expand_paths(path, ".npy", TEXT_SUFFIXES)
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

        The texts are separated as in `from_text`, and the tokens are held in memory. For more text than fits there, use
        `homebrew prepare` and `from_shards`.

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
        tokenizer: str | Path | Tokenizer | None = None,
        stride: int | None = None,
    ) -> Self:
        """Create a dataset from token ids. The ids are copied.

        Args:
            ids: Token ids, (num_tokens,), integers.
            block_size: Sequence length of the inputs, in tokens.
            vocab_size: Size of the vocabulary. If None it is the largest id plus 1.
            tokenizer: Tokenizer that made the ids, or its name. None for a tokenizer of another library.
            stride: As in `from_text`.

        Raises:
            ConfigError: The tokenizer is not a `Tokenizer`.
            DataError: If there are fewer ids than one window needs, or an id is outside the vocabulary.
        """
        if tokenizer is not None:
            tokenizer = as_tokenizer(tokenizer)
        return cls._from_ids(ids, block_size, vocab_size=vocab_size, tokenizer=tokenizer, stride=stride)

    @classmethod
    def _from_ids(
        cls,
        ids: Tensor | NDArray[np.integer] | Sequence[int],
        block_size: int,
        *,
        vocab_size: int | None,
        tokenizer: Tokenizer | None,
        stride: int | None,
        num_text_bytes: int | None = None,
        source: str | None = None,
    ) -> Self:
        """Create a dataset as `from_tokens` does, of ids whose text and source may be known."""
        array = as_token_ids(ids)
        starts = window_starts(len(array), block_size, stride)
        check_not_empty(starts, len(array), block_size, source)
        vocab_size = as_integer(
            "vocab_size", int(array.max()) + 1 if vocab_size is None else vocab_size, 1, MAX_VOCAB_SIZE, error=DataError
        )
        check_token_ids(array, vocab_size)
        # int32 is the smallest dtype that both PyTorch's indexing and the CUDA kernels support.
        tokens = MemoryTokens(torch.from_numpy(array.astype(np.int32)))
        return cls(
            tokens,
            starts,
            block_size=block_size,
            vocab_size=vocab_size,
            tokenizer=tokenizer,
            num_text_bytes=num_text_bytes,
            source=source,
        )

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
            paths: Path of a token file (see `from_file`) or of a folder (all its .npy files), a pattern such as
                "fineweb/train_*.bin", or a sequence of them.
            block_size: Sequence length of the inputs, in tokens.
            tokenizer: Tokenizer that made the tokens, or its name. If None, the one that the files name.
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
        description = describe_files([file.path for file in files], kind="token file")
        check_not_empty(starts, max(map(len, files)), block_size, description)
        sizes = [file.metadata.num_text_bytes for file in files]
        origin = f" (from {metadata.source})" if metadata.source else ""
        return cls(
            tokens,
            starts,
            block_size=block_size,
            vocab_size=metadata.vocab_size,
            tokenizer=tokens.tokenizer,
            num_text_bytes=None if None in sizes else sum(filter(None, sizes)),
            source=description + origin,
        )
