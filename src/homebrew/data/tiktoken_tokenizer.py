"""Byte-level byte-pair encodings with tiktoken and GPT-2's rules for splitting words, in chunks of bounded size."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Protocol

import numpy as np
import tiktoken
from numpy.typing import NDArray

from homebrew.data.gpt2_vocabulary import END_OF_TEXT
from homebrew.data.token_ids import validated_ids
from homebrew.data.utf8 import encode_utf8

_PATTERN = (  # splits a text into words before merging; Radford et al. 2019, in tiktoken's notation
    r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
)

CHUNK_CHARACTERS = 2**16
"""Number of characters that are encoded at a time. tiktoken's regular expression fails at a million spaces, and
tiktoken needs about 200 bytes of memory per character."""

_NUM_HELD_BACK = 256
"""Number of tokens at the end of a chunk that are encoded again with the next chunk; see `encode_chunks`."""


class Encoding(Protocol):
    """The part of `tiktoken.Encoding`'s interface that `TiktokenTokenizer` uses. `FastEncoding` has it, too."""

    @property
    def n_vocab(self) -> int:
        """Number of token ids."""

    @property
    def eot_token(self) -> int:
        """Id of the end-of-text token."""

    @property
    def special_tokens_set(self) -> set[str]:
        """Names of the special tokens."""

    def encode_ordinary(self, text: str) -> Sequence[int] | NDArray[np.uint32]:
        """Encode a text without special tokens."""

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Decode token ids to UTF-8 bytes."""

    def decode_single_token_bytes(self, token: int) -> bytes:
        """Decode one token id to UTF-8 bytes."""


class TiktokenTokenizer:
    """Base of the byte-pair tokenizers. "<|endoftext|>" in a text is encoded as ordinary text.

    Args:
        encoding: Encoding with GPT-2's rules for splitting words, from `build_encoding`.
    """

    def __init__(self, encoding: Encoding) -> None:
        self.vocab_size = encoding.n_vocab
        self.end_of_text_id = encoding.eot_token if END_OF_TEXT in encoding.special_tokens_set else None
        self._encoding = encoding

    def encode(self, text: str) -> NDArray[np.int64]:
        """Encode a text as token ids, (num_tokens,), int64."""
        encode_utf8(text)  # raises for surrogates, which tiktoken would replace
        return np.concatenate([*self.encode_chunks([text])])

    def encode_chunks(self, chunks: Iterable[str]) -> Iterator[NDArray[np.int64]]:
        """Encode a text that is given in chunks, cut anywhere. The ids are those of the entire text.

        The last tokens of a chunk may depend on the text that follows. They are not yielded, but encoded again with the
        next chunk. The other tokens are final: later words do not affect them, and a later part of the same word
        changes only the few tokens before it, since a merge depends only on earlier merges next to it. If the first
        tokens of a word are cut off, its other tokens stay the same.
        """
        held_back: Sequence[int] | NDArray[np.uint32] = []
        for chunk in chunks:
            for start in range(0, len(chunk), CHUNK_CHARACTERS):
                text = self.decode([*held_back]) + chunk[start : start + CHUNK_CHARACTERS]
                ids = self._encoding.encode_ordinary(text)
                cut = self._last_cut(ids)
                yield np.array(ids[:cut], dtype=np.int64)
                held_back = ids[cut:]
        yield np.array(held_back, dtype=np.int64)

    def _last_cut(self, ids: Sequence[int] | NDArray[np.uint32]) -> int:
        """Return the last position at which final tokens can be cut off; 0 if there is none."""
        for cut in range(len(ids) - _NUM_HELD_BACK, 0, -1):
            token, following = map(self._encoding.decode_single_token_bytes, ids[cut : cut + 2])
            is_inside_character = token[0] & 0xC0 == 0x80
            # In "!'s" the words are "!'" and "s", but "'s" after a cut would be one word.
            is_apostrophe = token == b"'" and following.isalpha()
            if not is_inside_character and not is_apostrophe:
                return cut
        return 0

    def decode(self, ids: Sequence[int]) -> str:
        """Decode token ids to text. Invalid UTF-8 is replaced by U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Decode token ids to UTF-8 bytes, which may start or end inside a character."""
        return self._encoding.decode_bytes(validated_ids(ids, self.vocab_size))


def build_encoding(ids: Mapping[bytes, int], end_of_text_id: int | None) -> tiktoken.Encoding:
    """Build tiktoken's encoding of a vocabulary.

    Args:
        ids: Id of each token, given as bytes. tiktoken merges the pair whose merge has the lowest id first.
        end_of_text_id: Id of "<|endoftext|>", or None if there is no such token.
    """
    special_tokens = {} if end_of_text_id is None else {END_OF_TEXT: end_of_text_id}
    return tiktoken.Encoding(
        name="bpe",
        explicit_n_vocab=len(ids) + len(special_tokens),
        pat_str=_PATTERN,
        mergeable_ranks=dict(ids),
        special_tokens=special_tokens,
    )


@cache
def gpt2_byte_to_char() -> dict[int, str]:
    """Return the printable character that GPT-2's vocabulary files write for each byte.

    Printable bytes stand for themselves. The others are written as the characters from U+0100 on.
    The result is cached: do not modify it.
    """
    printable = [byte for byte in range(256) if chr(byte).isprintable() and byte != ord(" ")]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def to_notation(token: bytes) -> str:
    """Write a token's bytes as GPT-2's vocabulary files do."""
    table = gpt2_byte_to_char()
    return "".join(table[byte] for byte in token)


def from_notation(token: str) -> bytes:
    """Read a token's bytes from the notation of GPT-2's vocabulary files.

    Raises:
        KeyError: If a character does not stand for a byte.
    """
    table = _gpt2_char_to_byte()
    return bytes(table[char] for char in token)


@cache
def _gpt2_char_to_byte() -> dict[str, int]:
    return {char: byte for byte, char in gpt2_byte_to_char().items()}
