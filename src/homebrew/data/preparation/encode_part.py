"""Encode a part of the input of `prepare` into files of token ids, one for each split, beside their counts.

The counts are written last: a part whose counts exist is complete.
"""

import contextlib
import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from homebrew.bounded_readers import read_json
from homebrew.data.fast_tokenizer import FastTokenizer, fast_tokenizer
from homebrew.data.preparation.documents import Document, Span, document_beginning, read_documents
from homebrew.data.tiktoken_tokenizer import CHUNK_CHARACTERS
from homebrew.data.token_formats import token_dtype
from homebrew.data.tokenizer import Tokenizer, encode_chunks, tokenizer_from_json
from homebrew.errors import DataError
from homebrew.io import atomic_replace, strict_json, write_errors

Counts = dict[str, int]
"""Number of tokens of each split, such as "train", and of its documents, such as "train_documents"."""
Split = Literal["train", "val"]
SPLITS: tuple[Split, Split] = ("train", "val")

_KEY_CHARACTERS = 2**16
"""Number of characters at the start of a document whose hash decides on its split."""


@dataclass(frozen=True)
class EncodeSettings:
    """How to encode the parts. They are passed to other processes as JSON."""

    folder: str
    """Folder to write to."""
    tokenizer: dict[str, Any]
    """`Tokenizer.to_json` of the tokenizer."""
    is_fast: bool
    """Whether to encode with gigatoken."""
    text_field: str
    """This field and all below are arguments of `prepare`."""
    allow_special: bool
    val_fraction: float

    def options(self) -> dict[str, object]:
        """Return what the ids depend on, besides the input, in a form that can be compared."""
        tokenizer = {key: value for key, value in self.tokenizer.items() if key != "alphabet"}  # part of the input
        description = strict_json(tokenizer, sort_keys=True)
        return {
            "tokenizer": f"{tokenizer['name']} ({hashlib.sha256(description.encode()).hexdigest()[:8]})",
            "text_field": self.text_field,
            "allow_special": self.allow_special,
            "val_fraction": self.val_fraction,
        }


class PartFiles:
    """The files of one encoded part.

    Args:
        folder: Folder of all parts.
        index: Index of the part.
    """

    def __init__(self, folder: Path, index: int) -> None:
        self.counts = folder / f"{index:06}.json"
        self.ids = {split: folder / f"{index:06}.{split}" for split in SPLITS}

    def read_counts(self) -> Counts | None:
        """Return the numbers of documents and of tokens of each split, or None if the part is not complete."""
        return read_json(self.counts, DataError) if self.counts.exists() else None


class PartEncoder:
    """Encodes parts, one after another.

    Args:
        settings: How to encode them.
    """

    def __init__(self, settings: EncodeSettings) -> None:
        self._settings = settings
        fast = fast_tokenizer(settings.tokenizer) if settings.is_fast else None
        self._tokenizer: Tokenizer = tokenizer_from_json(settings.tokenizer) if fast is None else fast

    def encode(self, index: int, spans: list[Span]) -> Counts:
        """Encode a part.

        Args:
            index: Index of the part.
            spans: Spans of the part.

        Returns:
            The numbers of tokens and of documents of each split. Each encoded document begins with the end-of-text
            token, if the tokenizer has one.

        Raises:
            DataError: If a document cannot be read.
        """
        files = PartFiles(Path(self._settings.folder), index)
        remedy = "Free some disk space, or check the permissions; the same command continues."
        with write_errors(files.counts, DataError, remedy):
            return self._write(files, spans)

    def _write(self, files: PartFiles, spans: list[Span]) -> Counts:
        with contextlib.ExitStack() as stack:
            writers = {}
            for split in SPLITS if self._settings.val_fraction else SPLITS[:1]:
                file = stack.enter_context(stack.enter_context(atomic_replace(files.ids[split])).open("wb"))
                writers[split] = _IdWriter(file, self._tokenizer)
            for span in spans:
                for document in read_documents(
                    span, self._settings.text_field, split_at_end_of_text=self._settings.allow_special
                ):
                    split, document = self._choose_split(document, span)
                    writers[split].add(document)
            for writer in writers.values():
                writer.flush()
        counts: Counts = {split: writer.num_tokens for split, writer in writers.items()}
        counts |= {f"{split}_documents": writer.num_documents for split, writer in writers.items()}
        with atomic_replace(files.counts) as temporary:
            temporary.write_text(strict_json(counts), encoding="utf-8")
        return counts

    def _choose_split(self, document: Document, span: Span) -> tuple[Split, Document]:
        """Choose a document's split by the hash of its first characters."""
        fraction = self._settings.val_fraction
        if not fraction:
            return "train", document
        if document.is_continued:  # the key is at the start of the file, in an earlier part
            key = document_beginning(span.path, _KEY_CHARACTERS)
        else:
            key = document.text
            while len(key) < _KEY_CHARACTERS and (chunk := next(document.rest, None)) is not None:
                key += chunk
            document = document._replace(text=key)
        digest = hashlib.blake2b(key[:_KEY_CHARACTERS].encode(), digest_size=8).digest()
        return ("val" if int.from_bytes(digest, "big") < fraction * 2**64 else "train"), document


class _IdWriter:
    """Writes the token ids of documents to a file. Memory does not depend on the length of a document."""

    def __init__(self, file: BinaryIO, tokenizer: Tokenizer) -> None:
        self.num_tokens = self.num_documents = 0
        self._file = file
        self._tokenizer = tokenizer
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._short: list[str] = []
        self._num_short_characters = 0

    def add(self, document: Document) -> None:
        """Write a document, or buffer it if it is short."""
        self.num_documents += not document.is_continued
        text, rest = document.text, list(itertools.islice(document.rest, 1))
        if isinstance(self._tokenizer, FastTokenizer) and not (rest or document.is_continued):
            if self._num_short_characters + len(text) > CHUNK_CHARACTERS:
                self.flush()
            if len(text) <= CHUNK_CHARACTERS:
                self._short.append(text)
                self._num_short_characters += len(text)
                return
        self.flush()
        if not document.is_continued and self._tokenizer.end_of_text_id is not None:
            self._write(np.array([self._tokenizer.end_of_text_id]))
        for ids in encode_chunks(self._tokenizer, _limit(itertools.chain([text], rest, document.rest))):
            self._write(ids)

    def flush(self) -> None:
        """Write the buffered short documents."""
        if self._short and isinstance(self._tokenizer, FastTokenizer):
            self._write(self._tokenizer.encode_documents(self._short))
            self._short, self._num_short_characters = [], 0

    def _write(self, ids: NDArray[np.integer]) -> None:
        self._file.write(ids.astype(self._dtype).data)
        self.num_tokens += len(ids)


def _limit(chunks: Iterator[str]) -> Iterator[str]:
    """Cut chunks that are longer than `CHUNK_CHARACTERS`."""
    for chunk in chunks:
        for start in range(0, len(chunk), CHUNK_CHARACTERS):
            yield chunk[start : start + CHUNK_CHARACTERS]
