"""Writer for tokenizer files: those that transformers' AutoTokenizer reads, and homebrew's own description."""

import itertools
from collections.abc import Mapping
from typing import Any

from homebrew.data.gpt2_tokenizer import gpt2_byte_to_char
from homebrew.data.gpt2_vocabulary import END_OF_TEXT
from homebrew.data.tokenizer import Tokenizer
from homebrew.errors import ModelError
from homebrew.io import strict_json

HOMEBREW_FILE = "homebrew_tokenizer.json"
"""File with the result of `Tokenizer.to_json`."""

TOKENIZER_FILES = (
    HOMEBREW_FILE,
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "chat_template.jinja",
)
"""All files that AutoTokenizer reads. A stale one of another tokenizer would change the ids."""


ANY_CHARACTER = r"[\s\S]"
"""Regular expression by which an exported `CharTokenizer` splits a text into characters."""

UNKNOWN_CHARACTER = "<unk>"
"""Its unknown token. As the vocabulary lacks it, an unknown character is an error, as in `CharTokenizer`."""


def tokenizer_files(tokenizer: Tokenizer, *, model_max_length: int) -> dict[str, str]:
    """Return the contents of a tokenizer's files by file name.

    Raises:
        ModelError: transformers cannot represent the tokenizer: tokens are neither all characters nor each the
            merge of two others, or several have the same bytes.
    """
    end_of_text_id = tokenizer.end_of_text_id
    ids: dict[bytes, int] = {}
    for i in range(tokenizer.vocab_size):
        if i != end_of_text_id and (first := ids.setdefault(token := tokenizer.decode_bytes([i]), i)) != i:
            raise ModelError(
                f"The tokens {first} and {i} of the tokenizer {tokenizer.name!r} are both {token!r}, which "
                f"transformers' tokenizers cannot represent. Save the model without the tokenizer."
            )
    char_ids = {token.decode(errors="replace"): i for token, i in ids.items()}
    if end_of_text_id is None and all(len(char) == 1 and char.encode() in ids for char in char_ids):
        tokenizer_class, files = "PreTrainedTokenizerFast", {"tokenizer.json": to_json(_character_tokenizer(char_ids))}
    else:
        tokenizer_class, files = "GPT2Tokenizer", _byte_pair_files(ids, end_of_text_id)
    special_token = None if end_of_text_id is None else END_OF_TEXT
    config = {
        "tokenizer_class": tokenizer_class,
        "model_max_length": model_max_length,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), special_token),
    }
    return files | {"tokenizer_config.json": to_json(config), HOMEBREW_FILE: to_json(tokenizer.to_json())}


def to_json(value: Mapping[str, Any]) -> str:
    """Format an object as the contents of a JSON file."""
    return strict_json(value, indent=2, ensure_ascii=False) + "\n"


def _character_tokenizer(char_ids: Mapping[str, int]) -> dict[str, Any]:
    """Return a `tokenizer.json` in which every character is a word."""
    split = {"type": "Split", "pattern": {"Regex": ANY_CHARACTER}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        **dict.fromkeys(("truncation", "padding", "normalizer", "post_processor")),
        "added_tokens": [],
        "pre_tokenizer": split,
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": dict(char_ids), "unk_token": UNKNOWN_CHARACTER},
    }


def _byte_pair_files(ids: Mapping[bytes, int], end_of_text_id: int | None) -> dict[str, str]:
    """Return the vocabulary and merges as transformers' GPT2Tokenizer reads them.

    The merges follow from the tokens: ids are in the order of the merges, so the pair that makes a token is what
    remains of its bytes after the merges of all lower ids.
    """
    merges = ["#version: 0.2"]
    for token in ids:
        if len(token) > 1:
            parts = _apply_earlier_merges(token, ids)
            if len(parts) != 2 or not ids.keys() >= set(parts):
                raise ModelError(
                    f"Token {ids[token]} ({token.decode(errors='replace')!r}) is not the merge of two other tokens, "
                    f"so transformers' GPT-2 tokenizer cannot represent it. Save the model without the tokenizer."
                )
            merges.append(" ".join(map(_to_chars, parts)))
    vocabulary = {_to_chars(token): i for token, i in ids.items()}
    if end_of_text_id is not None:
        vocabulary[END_OF_TEXT] = end_of_text_id
    return {"vocab.json": strict_json(vocabulary, ensure_ascii=False), "merges.txt": "\n".join(merges) + "\n"}


def _apply_earlier_merges(token: bytes, ids: Mapping[bytes, int]) -> list[bytes]:
    """Split a token into bytes and apply the merges of all lower ids."""
    parts = [bytes([byte]) for byte in token]
    while True:
        pair_ids = [ids.get(a + b, len(ids) + 1) for a, b in itertools.pairwise(parts)]
        lowest = min(pair_ids, default=ids[token])
        if lowest >= ids[token]:
            return parts
        i = pair_ids.index(lowest)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def _to_chars(token: bytes) -> str:
    """Write a token's bytes as GPT-2's vocabulary files do."""
    table = gpt2_byte_to_char()
    return "".join(table[byte] for byte in token)
