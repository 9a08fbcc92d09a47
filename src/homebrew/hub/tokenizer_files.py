"""A tokenizer's files: those that transformers' AutoTokenizer reads, and one that we do."""

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from homebrew.errors import ModelError

END_OF_TEXT = "<|endoftext|>"

OUR_FILE = "homebrew_tokenizer.json"
"""What a tokenizer of ours is made from again."""

TOKENIZER_FILES = (
    OUR_FILE,
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
"""All that AutoTokenizer looks at: one left from another tokenizer would change the ids."""


class ExportableTokenizer(Protocol):
    """What an export needs of a tokenizer: which bytes each id stands for."""

    @property
    def vocab_size(self) -> int:
        """How many ids there are."""

    @property
    def end_of_text_id(self) -> int | None:
        """The id that ends a text."""

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes that the ids stand for."""

    def to_json(self) -> dict[str, Any]:
        """What it is made from again."""


def tokenizer_files(tokenizer: ExportableTokenizer, *, model_max_length: int) -> dict[str, str]:
    """The texts of a tokenizer's files, by name.

    Args:
        tokenizer: of characters, of bytes, or of byte pairs as GPT-2's is.
        model_max_length: the model's block size, in tokens.

    Raises:
        ModelError: a token is neither a character, as all others are, nor made of two others.
    """
    end = tokenizer.end_of_text_id
    tokens = {tokenizer.decode_bytes([i]): i for i in range(tokenizer.vocab_size) if i != end}
    alphabet = {token.decode(errors="replace"): i for token, i in tokens.items()}
    if end is None and all(len(token) == 1 and token.encode() in tokens for token in alphabet):
        name, files = "PreTrainedTokenizerFast", {"tokenizer.json": to_json(_characters(alphabet))}
    else:
        name, files = "GPT2Tokenizer", _byte_pairs(tokens, end)
    settings = {
        "tokenizer_class": name,
        "model_max_length": model_max_length,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), None if end is None else END_OF_TEXT),
    }
    return files | {"tokenizer_config.json": to_json(settings), OUR_FILE: to_json(tokenizer.to_json())}


def to_json(value: Mapping[str, Any]) -> str:
    """A JSON file's text."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _characters(alphabet: Mapping[str, int]) -> dict[str, Any]:
    """The tokenizers library's own format: every character is a word."""
    each = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        **dict.fromkeys(("truncation", "padding", "normalizer", "post_processor")),
        "added_tokens": [],
        "pre_tokenizer": each,
        "decoder": {"type": "Fuse"},
        # There is no such token, so that a character outside the alphabet is an error, as with us.
        "model": {"type": "WordLevel", "vocab": dict(alphabet), "unk_token": "<unk>"},
    }


def _byte_pairs(tokens: Mapping[bytes, int], end: int | None) -> dict[str, str]:
    """What GPT2Tokenizer reads: the vocabulary, and the pairs in the order in which they were merged.

    A byte-pair encoding is known by its tokens' bytes: ids are in the order of the merges, so the pair that made a
    token is what its bytes come to under the merges before it.
    """
    merges = ["#version: 0.2"]
    for token in tokens:
        if len(token) > 1:
            parts = _merged(token, tokens)
            if len(parts) != 2 or not tokens.keys() >= set(parts):
                raise ModelError(
                    f"Token {tokens[token]} ({token.decode(errors='replace')!r}) is not made of two others, "
                    f"so transformers' GPT-2 tokenizer cannot have it. Save the model without the tokenizer."
                )
            merges.append(" ".join(map(_printable, parts)))
    vocabulary = {_printable(token): i for token, i in tokens.items()}
    if end is not None:
        vocabulary[END_OF_TEXT] = end
    return {"vocab.json": json.dumps(vocabulary, ensure_ascii=False), "merges.txt": "\n".join(merges) + "\n"}


def _merged(token: bytes, ranks: Mapping[bytes, int]) -> list[bytes]:
    """The parts that a token's bytes come to under the merges that were made before it."""
    parts = [bytes([byte]) for byte in token]
    while True:
        pairs = [ranks.get(a + b, len(ranks) + 1) for a, b in itertools.pairwise(parts)]
        first = min(pairs, default=ranks[token])
        if first >= ranks[token]:
            return parts
        at = pairs.index(first)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def _printable(token: bytes) -> str:
    """GPT-2's spelling of bytes: those that print as themselves, the others as characters from 256 on."""
    return "".join(_SPELLING[byte] for byte in token)


_PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]
_SPELLING = {byte: chr(byte) for byte in _PRINTED} | {
    byte: chr(256 + n) for n, byte in enumerate(byte for byte in range(256) if byte not in _PRINTED)
}
