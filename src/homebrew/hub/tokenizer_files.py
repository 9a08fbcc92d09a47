"""Writer for tokenizer files: those that transformers' AutoTokenizer reads, and homebrew's own description."""

from collections.abc import Mapping
from typing import Any

from homebrew.data.byte_pair_tokenizer import BytePairTokenizer, find_merges
from homebrew.data.gpt2_vocabulary import END_OF_TEXT
from homebrew.data.tiktoken_tokenizer import to_notation
from homebrew.data.tokenizer import Tokenizer
from homebrew.data.tokenizer_json import TOKENIZER_FILE, format_tokenizer_json
from homebrew.errors import DataError, ModelError
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
    tokenizer_class, files = _vocabulary_files(tokenizer)
    special_token = None if tokenizer.end_of_text_id is None else END_OF_TEXT
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


def _vocabulary_files(tokenizer: Tokenizer) -> tuple[str, dict[str, str]]:
    """Return the class of transformers that reads a tokenizer, and the files with its vocabulary."""
    if isinstance(tokenizer, BytePairTokenizer):
        return "PreTrainedTokenizerFast", {TOKENIZER_FILE: format_tokenizer_json(tokenizer)}
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
        return "PreTrainedTokenizerFast", {TOKENIZER_FILE: to_json(_character_tokenizer(char_ids))}
    return "GPT2Tokenizer", _byte_pair_files(ids, end_of_text_id)


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
    """Return the vocabulary and merges as transformers' GPT2Tokenizer reads them."""
    try:
        merges = [f"{to_notation(a)} {to_notation(b)}" for a, b in find_merges(ids)]
    except DataError as error:
        raise ModelError(f"{error} To save the model without the tokenizer, pass none.") from error
    vocabulary = {to_notation(token): i for token, i in ids.items()}
    if end_of_text_id is not None:
        vocabulary[END_OF_TEXT] = end_of_text_id
    text = "\n".join(["#version: 0.2", *merges]) + "\n"
    return {"vocab.json": strict_json(vocabulary, ensure_ascii=False), "merges.txt": text}
