"""Tokenizers: the `Tokenizer` protocol, and the three that homebrew ships: GPT-2's, bytes and characters."""

import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any, Protocol, runtime_checkable

import numpy as np
import tiktoken
from numpy.typing import NDArray

from homebrew.data.gpt2_vocabulary import END_OF_TEXT, gpt2_vocabulary_file
from homebrew.errors import DataError

_GPT2_PATTERN = (  # splits a text into words before merging; Radford et al. 2019, in tiktoken's notation
    r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
)
_END_OF_TEXT_ID = 50_256

CHUNK_CHARACTERS = 2**16
"""Characters of a text that are encoded at a time. tiktoken's regular expression fails at a million spaces, and its
memory is about 200 bytes per character."""

_NUM_HELD_BACK = 256
"""Tokens at the end of a chunk that are encoded again with the next one. See `GPT2Tokenizer.encode_chunks`."""


@runtime_checkable
class Tokenizer(Protocol):
    """Interface of a tokenizer. Implement it to use a custom tokenizer."""

    name: str
    """Name in messages and metadata; `get_tokenizer` finds the built-in tokenizers by it."""
    vocab_size: int
    """Number of token ids."""
    end_of_text_id: int | None
    """Id of the end-of-text token, or None if the tokenizer has none."""

    def encode(self, text: str) -> NDArray[np.int64]:
        """Encode a text as token ids, (num_tokens,), int64."""

    def decode(self, ids: Sequence[int]) -> str:
        """Decode token ids to text. Invalid UTF-8 is replaced by U+FFFD."""

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Decode token ids to UTF-8 bytes, which may start or end inside a character."""

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-serializable description, from which `tokenizer_from_json` builds the tokenizer."""


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

        The last tokens of a chunk could differ in the entire text, so they are encoded again with the next chunk.
        The other tokens are final. A word is not affected by the words after it, and within a word a merge depends
        only on merges of higher priority next to it, which ends after a few tokens. And for a word that is cut where
        a token of the entire word starts, the tokens of the two parts are those of the word.
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
        return self._encoding.decode_bytes(_validated_ids(ids, self.vocab_size))

    def to_json(self) -> dict[str, Any]:
        """Return the tokenizer's name."""
        return {"name": self.name}


class ByteTokenizer:
    """The UTF-8 bytes of a text as token ids, 0 to 255."""

    name = "bytes"
    vocab_size = 256
    end_of_text_id: int | None = None

    def encode(self, text: str) -> NDArray[np.int64]:
        """Encode a text as token ids, (num_tokens,), int64."""
        return np.frombuffer(encode_utf8(text), dtype=np.uint8).astype(np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        """Decode token ids to text. Invalid UTF-8 is replaced by U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Decode token ids to bytes, which may start or end inside a character."""
        return bytes(_validated_ids(ids, self.vocab_size))

    def to_json(self) -> dict[str, Any]:
        """Return the tokenizer's name."""
        return {"name": self.name}


class CharTokenizer:
    """One id for each character of an alphabet, in code point order.

    Raises:
        DataError: If the alphabet contains a surrogate, which is half of a character.
    """

    name = "char"
    end_of_text_id: int | None = None

    def __init__(self, alphabet: str) -> None:
        self.alphabet = "".join(sorted(set(alphabet)))
        encode_utf8(self.alphabet)  # raises for characters that could not be printed later
        self.vocab_size = len(self.alphabet)
        self._ids = {character: i for i, character in enumerate(self.alphabet)}

    def encode(self, text: str) -> NDArray[np.int64]:
        """Encode a text as token ids, (num_tokens,), int64.

        Raises:
            DataError: If a character is not in the alphabet.
        """
        _check_is_string(text)
        try:
            return np.fromiter((self._ids[character] for character in text), np.int64, len(text))
        except KeyError as error:
            raise DataError(
                f"The character {error.args[0]!r} is not in this tokenizer's alphabet of {self.vocab_size} characters. "
                f"Remove it from the text, or use the 'bytes' or 'gpt2' tokenizer."
            ) from None

    def decode(self, ids: Sequence[int]) -> str:
        """Decode token ids to text."""
        return "".join(self.alphabet[i] for i in _validated_ids(ids, self.vocab_size))

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Decode token ids to UTF-8 bytes."""
        return self.decode(ids).encode()

    def to_json(self) -> dict[str, Any]:
        """Return the tokenizer's name and alphabet."""
        return {"name": self.name, "alphabet": self.alphabet}


def get_tokenizer(name: str, *, text: str | None = None) -> Tokenizer:
    """Create a built-in tokenizer.

    Args:
        name: "gpt2", "bytes" or "char".
        text: Text whose characters become the alphabet of "char".

    Raises:
        DataError: If the name is unknown, or "char" is requested without a text.
        TokenizerError: If GPT-2's vocabulary is not available locally and cannot be downloaded.
    """
    if name == "gpt2":
        return GPT2Tokenizer()
    if name == "bytes":
        return ByteTokenizer()
    if name == "char":
        if not text:
            raise DataError("The 'char' tokenizer builds its alphabet from a text. Call get_tokenizer('char', text=…).")
        return CharTokenizer(text)
    raise DataError(f"Unknown tokenizer {name!r}. Choose 'gpt2', 'bytes' or 'char'.")


def encode_chunks(tokenizer: Tokenizer, chunks: Iterable[str]) -> Iterator[NDArray[np.int64]]:
    """Encode a text that is given in chunks, cut anywhere, with a built-in tokenizer."""
    if isinstance(tokenizer, GPT2Tokenizer):
        return tokenizer.encode_chunks(chunks)
    return map(tokenizer.encode, chunks)  # no token of bytes or characters spans two chunks


def tokenizer_from_json(description: dict[str, Any]) -> Tokenizer:
    """Create a built-in tokenizer from the result of its `to_json`."""
    alphabet = description.get("alphabet")
    if not isinstance(alphabet, str | None):
        raise DataError(
            f"The tokenizer's alphabet is {alphabet!r:.100}, but must be a string. Restore the file that it was "
            f"read from."
        )
    return get_tokenizer(str(description.get("name")), text=alphabet)


def dataset_tokenizer(dataset: object) -> Tokenizer | None:
    """Return `dataset.tokenizer` if it implements `Tokenizer`, else None.

    Another library's tokenizer lacks `to_json`, so a checkpoint could not store it.
    """
    tokenizer = getattr(dataset, "tokenizer", None)
    return tokenizer if isinstance(tokenizer, Tokenizer) else None


def default_prompt(tokenizer: Tokenizer) -> str:
    """Return the prompt for generation without one: a newline, or the first token if there is no newline."""
    return newline_for(tokenizer) or tokenizer.decode([0])


def newline_for(tokenizer: Tokenizer) -> str:
    """Return a newline, or an empty string if the tokenizer cannot encode a newline."""
    try:
        tokenizer.encode("\n")
    except DataError:
        return ""
    return "\n"


def encode_utf8(text: str) -> bytes:
    """Encode a text as UTF-8."""
    _check_is_string(text)
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"The text has U+{ord(text[error.start]):04X} at position {error.start}, a surrogate, which cannot be "
            f"encoded as UTF-8. Read the text with its own encoding, or with errors='replace'."
        ) from None


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
        pat_str=_GPT2_PATTERN,
        mergeable_ranks={bytes(char_to_byte[char] for char in token): rank for token, rank in ids.items()},
        special_tokens={END_OF_TEXT: _END_OF_TEXT_ID},
    )


def _check_is_string(text: object) -> None:
    if not isinstance(text, str):
        raise DataError(f"The text is of type {type(text).__name__}, but must be a string. Decode it first.")


def _validated_ids(ids: Sequence[int], vocab_size: int) -> list[int]:
    numbers = [int(i) for i in ids]
    for i in numbers:
        if not 0 <= i < vocab_size:
            raise DataError(
                f"Token id {i} is outside the vocabulary of {vocab_size} (0 to {vocab_size - 1}). Use the tokenizer "
                f"that made the ids."
            )
    return numbers
