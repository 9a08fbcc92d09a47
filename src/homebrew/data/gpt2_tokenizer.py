"""GPT-2's byte-pair encoding, by tiktoken, in chunks of bounded size."""

import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import tiktoken
from numpy.typing import NDArray

from homebrew.data.gpt2_vocabulary import END_OF_TEXT, gpt2_vocabulary_file
from homebrew.data.token_ids import validated_ids
from homebrew.data.utf8 import encode_utf8

_PATTERN = (  # splits a text into words before merging; Radford et al. 2019, in tiktoken's notation
    r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
)
_END_OF_TEXT_ID = 50_256

CHUNK_CHARACTERS = 2**16
"""Characters of a text that are encoded at a time. tiktoken's regular expression fails at a million spaces, and its
memory is about 200 bytes per character."""

_NUM_HELD_BACK = 256
"""Tokens at the end of a chunk that are encoded again with the next one. See `GPT2Tokenizer.encode_chunks`."""


class GPT2Tokenizer:
    """GPT-2's byte-pair encoding with 50,257 ids. "<|endoftext|>" in a text is encoded as ordinary text."""

    name = "gpt2"
    vocab_size = 50_257
    end_of_text_id: int | None = _END_OF_TEXT_ID

    def __init__(self) -> None:
        self._encoding = _gpt2_encoding()

    def encode(self, text: str) -> NDArray[np.int64]:
        """Encode a text as token ids, (num_tokens,), int64."""
        encode_utf8(text)  # raises for surrogates, which tiktoken would replace
        return np.concatenate([*self.encode_chunks([text])])

    def encode_chunks(self, chunks: Iterable[str]) -> Iterator[NDArray[np.int64]]:
        """Encode a text that is given in chunks, cut anywhere. The ids are those of the entire text.

        The last tokens of a chunk may depend on the text that follows, so they are kept and encoded again with
        the next chunk. The others are final: later words do not matter, and a later part of the same word changes
        only a few tokens before it, since a merge depends only on earlier merges next to it. A word whose first
        tokens are cut off keeps its other tokens.
        """
        held_back: list[int] = []
        for chunk in chunks:
            for start in range(0, len(chunk), CHUNK_CHARACTERS):
                text = self.decode(held_back) + chunk[start : start + CHUNK_CHARACTERS]
                ids = self._encoding.encode_ordinary(text)
                cut = self._last_cut(ids)
                yield np.array(ids[:cut], dtype=np.int64)
                held_back = ids[cut:]
        yield np.array(held_back, dtype=np.int64)

    def _last_cut(self, ids: Sequence[int]) -> int:
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

    def to_json(self) -> dict[str, Any]:
        """Return the tokenizer's name."""
        return {"name": self.name}


@cache
def gpt2_byte_to_char() -> dict[int, str]:
    """Return the printable character that GPT-2's vocabulary files write for each byte.

    Printable bytes stand for themselves. The others are written as the characters from U+0100 on.
    The result is cached: do not modify it.
    """
    printable = [byte for byte in range(256) if chr(byte).isprintable() and byte != ord(" ")]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


@cache
def _gpt2_encoding() -> tiktoken.Encoding:
    """Build tiktoken's encoding from a local file. tiktoken's own loader downloads without a timeout."""
    ids: dict[str, int] = json.loads(gpt2_vocabulary_file("encoder.json"))
    ids.pop(END_OF_TEXT)
    char_to_byte = {char: byte for byte, char in gpt2_byte_to_char().items()}
    return tiktoken.Encoding(
        name="gpt2",
        explicit_n_vocab=GPT2Tokenizer.vocab_size,
        pat_str=_PATTERN,
        mergeable_ranks={bytes(char_to_byte[char] for char in token): rank for token, rank in ids.items()},
        special_tokens={END_OF_TEXT: _END_OF_TEXT_ID},
    )
