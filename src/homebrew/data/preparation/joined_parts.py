"""The token ids of all encoded parts, one after another."""

import math
from collections.abc import Iterator, Mapping
from itertools import takewhile

import numpy as np

from homebrew.data.preparation.encode_part import Counts, PartFiles, Split
from homebrew.data.preparation.shard_writer import ShardWriter
from homebrew.data.preparation.state import PrepareState
from homebrew.data.token_formats import token_dtype
from homebrew.data.token_ids import TokenIds
from homebrew.data.tokenizer import Tokenizer
from homebrew.errors import DataError

_CHUNK_TOKENS = 2**20
"""Number of ids to read at a time."""


class JoinedParts:
    """The ids of all parts, with the end-of-text token between two documents.

    Args:
        state: Folder of the parts.
        num_parts: Number of parts.
        writers: The writer of each split's token files.
        tokenizer: Tokenizer that makes the ids.
        source: Description of the input, for messages.
    """

    def __init__(
        self,
        state: PrepareState,
        num_parts: int,
        writers: Mapping[Split, ShardWriter],
        tokenizer: Tokenizer,
        source: str,
    ) -> None:
        self._state = state
        self._writers = writers
        self._source = source
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._has_separator = tokenizer.end_of_text_id is not None
        self._counts = [state.part(i).read_counts() for i in range(num_parts)]
        self._num_read = self._num_removed = 0

    def incomplete(self, starts: Mapping[Split, int]) -> list[int]:
        """Return the indices of the parts that have to be encoded.

        Args:
            starts: Position of the first id of each split that will be read. The ids before it may have been removed.
        """
        for split, start in starts.items():
            end: float = -self._has_separator
            for i, counts in enumerate(self._counts):
                end += counts[split] if counts else math.inf  # the ends of later parts are unknown
                if end > start and not self._state.part(i).ids[split].exists():
                    self._counts[i] = None
        return [i for i, counts in enumerate(self._counts) if counts is None]

    def num_tokens(self, split: Split) -> int:
        """Return the number of ids in the parts before the first one that is not complete."""
        complete = takewhile(lambda counts: counts is not None, self._counts)
        return max(0, sum(counts[split] for counts in complete if counts) - self._has_separator)

    def num_documents(self, split: Split) -> int:
        """Return the number of documents in the parts that are complete."""
        return sum(counts[f"{split}_documents"] for counts in self._counts if counts)

    def read(self, split: Split, start: int, results: Iterator[Counts]) -> Iterator[TokenIds]:
        """Read the ids of a split.

        Args:
            split: The split.
            start: Number of ids to skip.
            results: Counts of the parts that are not complete. A part is read once its counts have arrived.

        Raises:
            DataError: If all documents are empty, or a split has none.
        """
        self._num_read = self._num_removed = 0
        skip = start + self._has_separator  # skip the separator before the first document
        for i, known in enumerate(self._counts):
            counts = next(results) if known is None else known
            self._counts[i] = counts
            if counts[split] > skip:
                yield from self._read_part(self._state.part(i), split, skip)
            skip = max(0, skip - counts[split])
            self._num_read = i + 1
        self._check()

    def remove_read(self, split: Split) -> None:
        """Remove the ids of the parts that have been read completely. Their counts are kept."""
        for i in range(self._num_removed, self._num_read):
            self._state.part(i).ids[split].unlink(missing_ok=True)
        self._num_removed = self._num_read

    def _read_part(self, part: PartFiles, split: Split, skip: int) -> Iterator[TokenIds]:
        with part.ids[split].open("rb") as file:
            file.seek(skip * self._dtype.itemsize)
            while data := file.read(_CHUNK_TOKENS * self._dtype.itemsize):
                yield np.frombuffer(data, self._dtype)

    def _check(self) -> None:
        num_documents = {split: self.num_documents(split) for split in self._writers}
        empty = [
            split
            for split, number in num_documents.items()
            if sum(counts[split] for counts in self._counts if counts) == number * self._has_separator
        ]
        if len(empty) == len(self._writers):
            error = no_text_error(self._source)
        elif empty:
            error = DataError(
                f"val_fraction splits the documents: of the {sum(num_documents.values())} in {self._source}, none "
                f"with text is for {empty[0]}. Give more documents or another val_fraction, or prepare two files."
            )
        else:
            return
        self._state.remove_parts()  # a run with other arguments cannot use them
        if self._state.has_shards():
            for writer in self._writers.values():
                writer.remove_shards(0)
        raise error


def no_text_error(source: str) -> DataError:
    """Build the error for an input without text."""
    return DataError(f"There is no text to prepare in {source}. Give files that are not empty.")
