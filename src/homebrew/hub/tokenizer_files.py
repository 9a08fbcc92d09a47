"""Writer for tokenizer files: those that transformers' AutoTokenizer reads, and homebrew's own description."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from homebrew.constants import TOKENIZER_FILE
from homebrew.data.byte_pair_tokenizer import BytePairTokenizer, find_merges
from homebrew.data.gpt2_vocabulary import END_OF_TEXT
from homebrew.data.tiktoken_tokenizer import to_notation
from homebrew.data.tokenizer import Tokenizer
from homebrew.data.tokenizer_json import byte_level_pipeline, format_tokenizer_json
from homebrew.errors import DataError, ModelError
from homebrew.io import atomic_replace, strict_json

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
"""All files that AutoTokenizer reads. A leftover file of another tokenizer would change the ids."""


ANY_CHARACTER = r"[\s\S]"
"""Regular expression by which an exported `CharTokenizer` splits a text into characters."""

UNKNOWN_CHARACTER = "<unk>"
"""Unknown token of an exported `CharTokenizer`. It is not in the vocabulary, so an unknown character is an error, as in
`CharTokenizer`."""


def tokenizer_files(tokenizer: Tokenizer, *, model_max_length: int | None, is_gpt: bool) -> dict[str, str]:
    """Return the contents of a tokenizer's files by file name.

    Args:
        tokenizer: The tokenizer.
        model_max_length: Maximum sequence length of the model, or None if it has none.
        is_gpt: Whether the model is a `GPT`, which transformers opens with its GPT2Tokenizer.

    Raises:
        ModelError: transformers cannot represent the tokenizer: its tokens are neither single characters nor merges of
            two other tokens, or several tokens have the same bytes.
    """
    tokenizer_class, files = _vocabulary_files(tokenizer, is_gpt=is_gpt)
    special_token = None if tokenizer.end_of_text_id is None else END_OF_TEXT
    config = {
        "tokenizer_class": tokenizer_class,
        **({} if model_max_length is None else {"model_max_length": model_max_length}),
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), special_token),
    }
    return files | {"tokenizer_config.json": to_json(config), HOMEBREW_FILE: to_json(tokenizer.to_json())}


def write_tokenizer_files(folder: Path, texts: Mapping[str, str]) -> None:
    """Write the files of a tokenizer, and remove other tokenizer files, which would contradict them."""
    for name, text in texts.items():
        with atomic_replace(folder / name) as path:
            path.write_bytes(text.encode())
    for name in set(TOKENIZER_FILES) - texts.keys():
        (folder / name).unlink(missing_ok=True)


def to_json(value: Mapping[str, Any]) -> str:
    """Format an object as the contents of a JSON file."""
    return strict_json(value, indent=2, ensure_ascii=False) + "\n"


def _vocabulary_files(tokenizer: Tokenizer, *, is_gpt: bool) -> tuple[str, dict[str, str]]:
    """Return the name of the transformers class that reads a tokenizer, and the files with the vocabulary."""
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
    vocabulary, merges = _byte_pairs(ids, end_of_text_id)
    if not is_gpt:
        pipeline = byte_level_pipeline(vocabulary, merges, end_of_text_id)
        return "PreTrainedTokenizerFast", {TOKENIZER_FILE: strict_json(pipeline, ensure_ascii=False) + "\n"}
    text = "\n".join(["#version: 0.2", *merges]) + "\n"
    return "GPT2Tokenizer", {"vocab.json": strict_json(vocabulary, ensure_ascii=False), "merges.txt": text}


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


def _byte_pairs(ids: Mapping[bytes, int], end_of_text_id: int | None) -> tuple[dict[str, int], list[str]]:
    """Return the vocabulary and the merges in the notation of GPT-2's vocabulary files."""
    try:
        merges = [f"{to_notation(a)} {to_notation(b)}" for a, b in find_merges(ids)]
    except DataError as error:
        raise ModelError(f"{error} To save the model without the tokenizer, pass none.") from error
    vocabulary = {to_notation(token): i for token, i in ids.items()}
    if end_of_text_id is not None:
        vocabulary[END_OF_TEXT] = end_of_text_id
    return vocabulary, merges
