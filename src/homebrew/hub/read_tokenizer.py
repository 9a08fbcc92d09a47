"""Reads the tokenizer of a model folder, if it is one that homebrew supports."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from homebrew.data.gpt2_tokenizer import GPT2Tokenizer
from homebrew.data.gpt2_vocabulary import END_OF_TEXT, gpt2_vocabulary_files
from homebrew.data.tokenizer import Tokenizer, tokenizer_from_json
from homebrew.errors import DataError, ModelError, TokenizerError
from homebrew.hub.model_folder import find_file, read_bounded_text, read_json
from homebrew.hub.tokenizer_files import HOMEBREW_FILE
from homebrew.hub.tokenizer_settings import unsupported_settings

_Encoding = tuple[Mapping[str, Any], list[str]]
"""A byte-pair encoding: the vocabulary with the end-of-text token, and the merges as "a b"."""


def read_tokenizer(folder: Path, *, vocab_size: int) -> Tokenizer | None:
    """Read the tokenizer of a model folder.

    Tokenizers exported by homebrew are supported, and GPT-2's, which is recognized by its vocabulary and merges.

    Returns:
        The tokenizer, or None if the folder has none or one with another vocabulary.

    Raises:
        ModelError: A file is invalid, the tokenizer is a variant of a supported one, such as one with added tokens,
            or it has more ids than the model.
        TokenizerError: GPT-2's vocabulary is not available.
    """
    tokenizer: Tokenizer | None = None
    if (path := find_file(folder, HOMEBREW_FILE)) is not None:
        tokenizer = _read_homebrew_tokenizer(path)
    elif _is_gpt2(_read_encoding(folder)):
        tokenizer = GPT2Tokenizer()
    if tokenizer is None:
        return None
    # Also of an export, whose files transformers may have saved again.
    if settings := unsupported_settings(folder, tokenizer):
        raise ModelError(
            f"The tokenizer in {folder} has the vocabulary of {tokenizer.name!r}, but is not supported because of "
            f"{', '.join(settings)}. Replace its files if the model was trained with the plain tokenizer, or load only "
            f"the weights, with GPT.from_pretrained."
        )
    if tokenizer.vocab_size > vocab_size:
        raise ModelError(
            f"The tokenizer in {folder} has {tokenizer.vocab_size} ids, but the model's vocab_size is {vocab_size}. "
            f"Replace the tokenizer's files by those of the model's tokenizer."
        )
    return tokenizer


def _read_homebrew_tokenizer(path: Path) -> Tokenizer:
    try:
        return tokenizer_from_json(read_json(path))
    except TokenizerError:  # a valid description, but GPT-2's vocabulary is not available
        raise
    except DataError as error:
        raise ModelError(f"{path} does not describe a homebrew tokenizer: {error}") from error


def _read_encoding(folder: Path) -> _Encoding | None:
    """Read a byte-pair encoding from `tokenizer.json`, or from `vocab.json` and `merges.txt`."""
    vocabulary: Any
    merges: Any
    if (path := find_file(folder, "tokenizer.json")) is not None:  # AutoTokenizer prefers this file too
        model = read_json(path).get("model")
        model = model if isinstance(model, dict) else {}
        vocabulary, merges = model.get("vocab"), model.get("merges")
    else:
        path, merges_path = find_file(folder, "vocab.json"), find_file(folder, "merges.txt")
        if path is None or merges_path is None:
            return None
        vocabulary = read_json(path)
        lines = read_bounded_text(merges_path).split("\n")
        merges = [line for line in lines if line and not line.startswith("#version")]
    if not isinstance(vocabulary, dict) or not isinstance(merges, list):
        return None
    pairs = [" ".join(pair) if _is_string_list(pair) else pair for pair in merges]
    if not _is_string_list(pairs):
        return None
    return {END_OF_TEXT: GPT2Tokenizer.end_of_text_id, **vocabulary}, pairs


def _is_string_list(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_gpt2(encoding: _Encoding | None) -> bool:
    if encoding is None or len(encoding[0]) != GPT2Tokenizer.vocab_size:
        return False
    files = gpt2_vocabulary_files()
    vocabulary = json.loads(files["encoder.json"])
    merges = [line for line in files["vocab.bpe"].decode().split("\n")[1:] if line]
    return encoding == (vocabulary, merges)
