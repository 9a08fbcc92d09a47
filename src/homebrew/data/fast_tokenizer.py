"""Fast encoding with gigatoken, an optional library that returns tiktoken's ids at many times its throughput."""

import itertools
import json
import sys
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from homebrew.data.byte_pair_tokenizer import BytePairTokenizer
from homebrew.data.gpt2_tokenizer import GPT2Tokenizer
from homebrew.data.gpt2_vocabulary import END_OF_TEXT, gpt2_vocabulary_files
from homebrew.data.tiktoken_tokenizer import TiktokenTokenizer
from homebrew.data.tokenizer import Tokenizer
from homebrew.data.tokenizer_json import byte_level_pipeline, pipeline_of
from homebrew.io import strict_json
from homebrew.user_warnings import warn

_MAX_CACHE_BYTES = 24 * 2**20
"""Growth of the process's memory after which the tokenizer is built again. gigatoken caches every word that it has
seen. Natural language and code have few distinct words, but random data has many."""

_CHARACTERS_BETWEEN_CHECKS = 2**20


class FastEncoding:
    """An encoding with gigatoken, used in place of a `tiktoken.Encoding`.

    Args:
        tokenizer_json: Contents of a `tokenizer.json` with the special token "<|endoftext|>" and no other.
        eot_token: Id of "<|endoftext|>".
        reference: Function that returns the tiktoken tokenizer. It encodes texts with new characters, which one of the
            two libraries may not yet know as letters.
    """

    def __init__(self, tokenizer_json: str, eot_token: int, reference: Callable[[], TiktokenTokenizer]) -> None:
        self.eot_token = eot_token
        self.special_tokens_set = {END_OF_TEXT}
        self._json = tokenizer_json
        self._reference = reference
        self._tokenizer: Any
        self._num_characters = self._memory = 0
        self._build()
        self.n_vocab = self._tokenizer.vocab_size

    def encode_ordinary(self, text: str) -> NDArray[np.uint32]:
        """Encode a text. "<|endoftext|>" is encoded as ordinary text."""
        if _has_unassigned(text):
            return self._reference().encode(text).astype(np.uint32)
        # gigatoken would encode "<|endoftext|>" as the special token. Cut it after "<|", where a word ends anyway.
        head, tail = END_OF_TEXT[:2], END_OF_TEXT[2:]
        parts = text.split(END_OF_TEXT)
        parts[:-1] = [part + head for part in parts[:-1]]
        parts[1:] = [tail + part for part in parts[1:]]
        ids = [self.encode_special(part) for part in parts]
        return ids[0] if len(ids) == 1 else np.concatenate(ids)

    def encode_special(self, text: str) -> NDArray[np.uint32]:
        """Encode a text without unassigned characters, in which "<|endoftext|>" is the end-of-text token."""
        self._num_characters += len(text)
        if self._num_characters > _CHARACTERS_BETWEEN_CHECKS:
            self._num_characters = 0
            if _memory() - self._memory > _MAX_CACHE_BYTES:
                self._build()
        ids: NDArray[np.uint32] = self._tokenizer.encode(text)
        return ids

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Decode token ids to UTF-8 bytes."""
        data: bytes = self._tokenizer.decode(list(ids))
        return data

    def decode_single_token_bytes(self, token: int) -> bytes:
        """Decode one token id to UTF-8 bytes."""
        return self.decode_bytes([token])

    def _build(self) -> None:
        import gigatoken

        self._tokenizer = None  # free its memory before building the next one
        self._tokenizer = gigatoken.Tokenizer.from_json(self._json).backend
        self._num_characters, self._memory = 0, _memory()


class FastTokenizer(TiktokenTokenizer):
    """A byte-pair tokenizer that encodes with gigatoken.

    Args:
        encoding: Encoding with gigatoken.
        description: `to_json` of the tokenizer.
    """

    def __init__(self, encoding: FastEncoding, description: dict[str, Any]) -> None:
        super().__init__(encoding)
        self.name = description["name"]
        self._description = description
        self._fast = encoding

    def to_json(self) -> dict[str, Any]:
        """Return the description of the tokenizer that this one replaces."""
        return self._description

    def encode_documents(self, texts: Sequence[str]) -> NDArray[np.uint32]:
        """Encode short texts at once, each with the end-of-text token before it."""
        if any(END_OF_TEXT in text or _has_unassigned(text) for text in texts):
            separator = np.array([self._fast.eot_token], np.uint32)
            return np.concatenate([ids for text in texts for ids in (separator, self._fast.encode_ordinary(text))])
        return self._fast.encode_special("".join([part for text in texts for part in (END_OF_TEXT, text)]))


def has_fast_tokenizer(tokenizer: Tokenizer, samples: Iterable[str]) -> bool:
    """Return whether gigatoken is installed and gives texts the same ids as a tokenizer.

    Args:
        tokenizer: The tokenizer.
        samples: Texts whose ids are compared. All characters that are new since Unicode 3.2 are compared, too.
    """
    if not isinstance(tokenizer, TiktokenTokenizer) or not _is_installed():
        return False
    fast = fast_tokenizer(tokenizer.to_json())
    if fast is None:
        return False
    for text in itertools.chain([_new_characters()], samples):
        if not np.array_equal(fast.encode_documents([text])[1:], tokenizer.encode(text)):
            warn(
                "gigatoken gives a text different ids than tiktoken, so the slower tiktoken is used. Update both "
                "libraries, or uninstall gigatoken to silence this warning."
            )
            return False
    return True


def fast_tokenizer(description: dict[str, Any]) -> FastTokenizer | None:
    """Build a fast tokenizer from another one's `to_json`, or return None if it is not a byte-pair tokenizer.

    The caller has to compare its ids with those of the other tokenizer, as `has_fast_tokenizer` does.
    """
    tokenizer: BytePairTokenizer | None = None
    match description["name"]:
        case GPT2Tokenizer.name:
            files = gpt2_vocabulary_files()
            _, *merges = files["vocab.bpe"].decode().splitlines()
            end_of_text_id = GPT2Tokenizer.end_of_text_id
            pipeline = byte_level_pipeline(json.loads(files["encoder.json"]), merges, end_of_text_id)
        case BytePairTokenizer.name:
            tokenizer = BytePairTokenizer(description["tokens"])
            end_of_text_id = tokenizer.end_of_text_id
            pipeline = pipeline_of(tokenizer)
        case _:
            return None
    if end_of_text_id is None:
        return None
    # The reference is built on first use: GPT-2's is large, and most texts do not need it.
    encoding = FastEncoding(strict_json(pipeline), end_of_text_id, lambda: tokenizer or GPT2Tokenizer())
    return FastTokenizer(encoding, description)


def _has_unassigned(text: str) -> bool:
    """Return whether a text has characters that Python's version of Unicode has not assigned.

    gigatoken and tiktoken have newer versions of Unicode than Python, and not always the same one.
    """
    if text.isascii() or text.replace("\n", "").isprintable():  # unassigned characters are not printable
        return False
    return any(unicodedata.category(character) == "Cn" for character in set(text))


def _new_characters() -> str:
    """Return the characters that are new since Unicode 3.2, each in a place where its category changes the ids."""
    return "".join(
        f"a{character}1{character}'s"
        for character in map(chr, range(sys.maxunicode + 1))
        if unicodedata.ucd_3_2_0.category(character) == "Cn" != unicodedata.category(character)
    )


def _is_installed() -> bool:
    try:
        import gigatoken  # noqa: F401
    except ImportError:
        return False
    return True


def _memory() -> int:
    """Return the memory of this process in bytes."""
    memory: int = psutil.Process().memory_info().rss
    return memory
