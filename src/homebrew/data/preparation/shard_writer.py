"""Write a sequence of token ids to one token file, or to shards of equal length."""

import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from homebrew.data.token_file import check_output_path, write_tokens
from homebrew.data.token_ids import TokenIds
from homebrew.data.token_metadata import TokenMetadata, metadata_path
from homebrew.data.tokenizer import Tokenizer
from homebrew.io import remove_leftovers


class ShardWriter:
    """Writes token files: `book.npy`, or the shards `book-00000.npy`, `book-00001.npy`, ….

    Args:
        output: Path of the token file. Shards are written beside it.
        shard_tokens: Number of tokens of each shard but the last, which may be shorter. If None, there is one file.
        tokenizer: Tokenizer that made the ids.
        source: Description of the text's origin.
    """

    def __init__(self, output: Path, shard_tokens: int | None, tokenizer: Tokenizer, source: str) -> None:
        self._output = output
        self.shard_tokens = shard_tokens
        self._tokenizer = tokenizer
        self._source = source
        self._token_bytes = np.full(tokenizer.vocab_size, -1, np.int16)  # -1: not known yet
        if tokenizer.end_of_text_id is not None:
            self._token_bytes[tokenizer.end_of_text_id] = 0

    def num_complete(self) -> int:
        """Return the number of shards that an earlier run has written."""
        if self.shard_tokens is None:
            return 0
        return next(i for i in itertools.count() if not metadata_path(self._path(i)).exists())

    def remove_shards(self, num_tokens: int) -> None:
        """Remove the shards that an earlier run has written, except those of the first `num_tokens` tokens.

        Raises:
            DataError: If a file with a shard's name is not a token file. Then no shard is removed.
        """
        if self.shard_tokens is None:
            return
        # Stop at the first gap: a file with a later number may be the user's, such as a date. Remove the last shard
        # first, so that a killed run leaves no gap.
        paths = map(self._path, itertools.count(num_tokens // self.shard_tokens))
        shards = list(itertools.takewhile(lambda path: path.exists() or metadata_path(path).exists(), paths))
        for shard in shards:
            check_output_path(shard)
        for shard in reversed(shards):
            metadata_path(shard).unlink(missing_ok=True)
            shard.unlink(missing_ok=True)

    def remove_leftovers(self) -> None:
        """Remove the temporary files that killed runs have left."""
        paths = {self._output}
        if self.shard_tokens is not None:
            name = re.compile(rf"\.{re.escape(self._output.stem)}-(\d{{5}})\..*")
            matches = (name.fullmatch(file.name) for file in self._output.parent.iterdir())
            paths = {self._path(int(match[1])) for match in matches if match}
        for path in paths:
            remove_leftovers(path)
            remove_leftovers(metadata_path(path))

    def write(
        self, arrays: Iterator[TokenIds], first: int, before_first: Callable[[], None]
    ) -> Iterator[TokenMetadata]:
        """Write token ids, and yield the metadata after each file.

        Args:
            arrays: The token ids in arrays that are not empty.
            first: Index of the first shard to write.
            before_first: Called when all ids of the first file are known, before the file appears.
        """
        for i, ids in enumerate(_cut(arrays, self.shard_tokens), start=first):
            yield write_tokens(
                self._path(i),
                _before_end(ids, before_first) if i == first else ids,
                vocab_size=self._tokenizer.vocab_size,
                tokenizer_json=self._tokenizer.to_json(),
                count_text_bytes=self._count_text_bytes,
                source=self._source,
            )

    def size(self) -> tuple[int, int]:
        """Return the number of tokens and of bytes of text in the file, or in all shards."""
        count = 1 if self.shard_tokens is None else self.num_complete()
        metadata = [TokenMetadata.read(metadata_path(self._path(i))) for i in range(count)]
        return sum(file.num_tokens for file in metadata), sum(file.num_text_bytes or 0 for file in metadata)

    def _count_text_bytes(self, ids: TokenIds) -> int:
        """Return the size of the text of token ids in UTF-8 bytes."""
        sizes = self._token_bytes[ids]
        if sizes.min() < 0:
            for i in np.unique(ids[sizes < 0]).tolist():
                self._token_bytes[i] = len(self._tokenizer.decode_bytes([i]))
            sizes = self._token_bytes[ids]
        return int(sizes.sum(dtype=np.int64))

    def _path(self, index: int) -> Path:
        if self.shard_tokens is None:
            return self._output
        return self._output.with_stem(f"{self._output.stem}-{index:05}")


def _cut(arrays: Iterator[TokenIds], length: int | None) -> Iterator[Iterator[TokenIds]]:
    """Cut a sequence of arrays into sequences of `length` ids. Each has to be read before the next."""
    rest = next(arrays, None)

    def ids() -> Iterator[TokenIds]:
        nonlocal rest
        missing = length
        while rest is not None and missing != 0:
            part, rest = rest[:missing], rest[len(rest) if missing is None else missing :]
            if missing is not None:
                missing -= len(part)
            yield part
            if not len(rest):
                rest = next(arrays, None)

    while rest is not None:
        yield ids()


def _before_end(arrays: Iterator[TokenIds], function: Callable[[], None]) -> Iterator[TokenIds]:
    """Yield arrays, and call a function after the last one."""
    yield from arrays
    function()
