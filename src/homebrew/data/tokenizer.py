"""The `Tokenizer` protocol, and homebrew's tokenizers: GPT-2's, bytes, characters and trained ones."""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from homebrew.data.byte_pair_tokenizer import BytePairTokenizer
from homebrew.data.gpt2_tokenizer import GPT2Tokenizer
from homebrew.data.tiktoken_tokenizer import TiktokenTokenizer
from homebrew.data.token_ids import validated_ids
from homebrew.data.tokenizer_json import OTHER_TOKENIZERS, open_tokenizer_json
from homebrew.data.utf8 import check_is_string, encode_utf8
from homebrew.errors import ConfigError, DataError, HomebrewError, TokenizerError
from homebrew.io import absolute_path
from homebrew.user_warnings import warn


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
        """Return a JSON-serializable description from which `tokenizer_from_json` builds the tokenizer."""


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
        return bytes(validated_ids(ids, self.vocab_size))

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
        check_is_string(text)
        try:
            return np.fromiter((self._ids[character] for character in text), np.int64, len(text))
        except KeyError as error:
            raise DataError(
                f"The character {error.args[0]!r} is not in this tokenizer's alphabet of {self.vocab_size} characters. "
                f"Remove it from the text, or use the 'bytes' or 'gpt2' tokenizer."
            ) from None

    def decode(self, ids: Sequence[int]) -> str:
        """Decode token ids to text."""
        return "".join(self.alphabet[i] for i in validated_ids(ids, self.vocab_size))

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Decode token ids to UTF-8 bytes."""
        return self.decode(ids).encode()

    def to_json(self) -> dict[str, Any]:
        """Return the tokenizer's name and alphabet."""
        return {"name": self.name, "alphabet": self.alphabet}


_BUILT_IN = ("gpt2", "bytes", "char")


def get_tokenizer(name: str | Path, *, text: str | None = None) -> Tokenizer:
    """Create a built-in tokenizer, or open a trained one.

    Args:
        name: "gpt2", "bytes" or "char", or the path of a `tokenizer.json` or its folder, such as
            `homebrew tokenizer train` writes. It must be a byte-level BPE that splits words as GPT-2 does.
        text: Text whose characters become the alphabet of "char".

    Raises:
        DataError: If the name is neither a tokenizer's nor an existing path, "char" is requested without a text, or
            the file is not a supported tokenizer.
        TokenizerError: If GPT-2's vocabulary is not available locally and cannot be downloaded.
    """
    name = str(name) if isinstance(name, Path) else name
    if name == "gpt2":
        return GPT2Tokenizer()
    if name == "bytes":
        return ByteTokenizer()
    if name == "char":
        if not text:
            raise DataError("The 'char' tokenizer builds its alphabet from a text. Call get_tokenizer('char', text=…).")
        return CharTokenizer(text)
    if not isinstance(name, str) or not name or not os.path.exists(absolute_path(name)):  # noqa: PTH110
        raise DataError(
            f"Unknown tokenizer {name!r:.200}. Choose 'gpt2', 'bytes' or 'char', or give the path of a tokenizer.json. "
            f"{OTHER_TOKENIZERS}"
        )
    return open_tokenizer_json(name)


def encode_chunks(tokenizer: Tokenizer, chunks: Iterable[str]) -> Iterator[NDArray[np.int64]]:
    """Encode a text that is given in chunks, cut anywhere, with one of homebrew's tokenizers."""
    if isinstance(tokenizer, TiktokenTokenizer):
        return tokenizer.encode_chunks(chunks)
    return map(tokenizer.encode, chunks)  # no token of bytes or characters spans two chunks


def saved_tokenizer(description: object, path: Path, error: type[HomebrewError]) -> Tokenizer | None:
    """Create the tokenizer that was saved with a model. For a custom tokenizer, warn and return None.

    Args:
        description: Any JSON value; valid if it is the result of a tokenizer's `to_json`.
        path: File that it was read from, for messages.
        error: Class of the error that is raised for an invalid description.

    Raises:
        TokenizerError: If GPT-2's vocabulary is not available.
    """
    if isinstance(description, dict) and not is_built_in(description):
        warn(
            f"The model was saved with the custom tokenizer {description.get('name')!r}, which its description cannot "
            f"restore. Use an object of its class."
        )
        return None
    try:
        return tokenizer_from_json(description)
    except TokenizerError:  # the description is valid
        raise
    except DataError as cause:
        raise error(f"{path} does not describe a tokenizer: {cause}") from cause


def is_built_in(description: dict[str, Any]) -> bool:
    """Return whether a description is of one of homebrew's tokenizers, and not of a custom one."""
    return description.get("name") in (*_BUILT_IN, BytePairTokenizer.name)


def tokenizer_from_json(description: object) -> Tokenizer:
    """Create one of homebrew's tokenizers from the result of its `to_json`."""
    match description:
        case {"name": BytePairTokenizer.name, "tokens": list(tokens)} if all(
            isinstance(token, str) for token in tokens
        ):
            tokenizer: Tokenizer = BytePairTokenizer(tokens)
        case {"name": "char", "alphabet": str(alphabet)} if alphabet:
            tokenizer = CharTokenizer(alphabet)
        case {"name": "gpt2" | "bytes" as name}:
            tokenizer = get_tokenizer(name)
        case _:
            raise DataError(f"{description!r:.200} does not describe a tokenizer. Restore the file it was read from.")
    if tokenizer.to_json() != description:
        raise DataError(
            f"The description {description!r:.200} of the tokenizer {tokenizer.name!r} has values that are not "
            f"supported. Restore the file that it was read from, or use the version of homebrew that wrote it."
        )
    return tokenizer


def check_tokenizer(tokenizer: object) -> None:
    """Raise ConfigError if an object does not implement `Tokenizer`."""
    if isinstance(tokenizer, type):  # a class has the methods, too
        raise ConfigError(f"The tokenizer is the class {tokenizer.__name__}. Pass an object of this class.")
    if not isinstance(tokenizer, Tokenizer):
        names = (*Tokenizer.__annotations__, "encode", "decode", "decode_bytes", "to_json")
        missing = [name for name in names if not hasattr(tokenizer, name)]
        raise ConfigError(
            f"{type(tokenizer).__name__} cannot be used as a tokenizer, as it lacks {', '.join(missing)}. Add what "
            f"homebrew.Tokenizer describes, or use one of homebrew.get_tokenizer. {OTHER_TOKENIZERS}"
        )


def as_tokenizer(tokenizer: str | Path | Tokenizer, *, text: str | None = None) -> Tokenizer:
    """Return `get_tokenizer` of a name or a path, or a custom tokenizer as it is, after `check_tokenizer`."""
    if isinstance(tokenizer, str | Path):
        return get_tokenizer(tokenizer, text=text)
    check_tokenizer(tokenizer)
    return tokenizer


def dataset_tokenizer(dataset: object) -> Tokenizer | None:
    """Return `dataset.tokenizer` if it implements `Tokenizer`, else None.

    Another library's tokenizer lacks `to_json`, so a checkpoint could not store it.
    """
    tokenizer = getattr(dataset, "tokenizer", None)
    return tokenizer if isinstance(tokenizer, Tokenizer) else None


def default_prompt(tokenizer: Tokenizer) -> str:
    """Return the prompt to use if none is given: a newline, or the first token if there is no newline."""
    return newline_for(tokenizer) or tokenizer.decode([0])


def newline_for(tokenizer: Tokenizer) -> str:
    """Return a newline, or an empty string if the tokenizer cannot encode a newline."""
    try:
        tokenizer.encode("\n")
    except DataError:
        return ""
    return "\n"
