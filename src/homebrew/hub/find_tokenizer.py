"""Which tokenizer a model in transformers' format was trained with, where that can be known."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from homebrew.data.gpt2_vocabulary import gpt2_vocabulary_files
from homebrew.data.tokenizer import GPT2Tokenizer, Tokenizer, tokenizer_from_json
from homebrew.errors import DataError, ModelError, TokenizerError
from homebrew.hub.from_pretrained import CONFIG_FILE
from homebrew.hub.source import Source, open_source, read_json, read_text
from homebrew.hub.tokenizer_files import END_OF_TEXT, OUR_FILE

_BytePairs = tuple[Mapping[str, int], list[str]]
"""The vocabulary without the end of a text, and the merges, "a b" each."""


def find_tokenizer(name_or_folder: str | Path, *, vocab_size: int) -> Tokenizer | None:
    """The tokenizer beside a model: one we exported, or GPT-2's, known by its vocabulary and merges.

    Args:
        name_or_folder: of the model.
        vocab_size: of the model.

    Returns:
        None where there is none, or another than these.

    Raises:
        ModelError: a file is damaged, or the tokenizer has ids that the model does not know.
        TokenizerError: GPT-2's vocabulary is not at hand.
    """
    source = open_source(name_or_folder)
    source.find(CONFIG_FILE)  # the hub's cache cannot tell that a file is missing before it has another
    tokenizer: Tokenizer | None = None
    if (path := source.find(OUR_FILE)) is not None:
        tokenizer = _ours(path)
    elif _is_gpt2s(_byte_pairs(source)):
        tokenizer = GPT2Tokenizer()
    if tokenizer is not None and tokenizer.vocab_size > vocab_size:
        raise ModelError(
            f"The tokenizer in {source.name} has {tokenizer.vocab_size} ids, but the model's vocab_size is "
            f"{vocab_size}: they do not belong together."
        )
    return tokenizer


def _ours(path: Path) -> Tokenizer:
    try:
        return tokenizer_from_json(read_json(path))
    except TokenizerError:  # it is one of ours, but its vocabulary is not at hand
        raise
    except DataError as error:
        raise ModelError(f"{path} does not describe a tokenizer of ours: {error}") from error


def _byte_pairs(source: Source) -> _BytePairs | None:
    """A byte-pair encoding, from whichever files transformers left it in."""
    vocabulary: Any
    merges: Any
    if (path := source.find("tokenizer.json")) is not None:  # AutoTokenizer too looks here first
        model = read_json(path).get("model")
        model = model if isinstance(model, dict) else {}
        vocabulary, merges = model.get("vocab"), model.get("merges")
    else:
        path, merges_path = source.find("vocab.json"), source.find("merges.txt")
        if path is None or merges_path is None:
            return None
        vocabulary = read_json(path)
        lines = read_text(merges_path).split("\n")
        merges = [line for line in lines if line and not line.startswith("#version")]
    if not isinstance(vocabulary, dict) or not isinstance(merges, list):
        return None
    pairs = [" ".join(pair) if _is_texts(pair) else pair for pair in merges]
    if not _is_texts(pairs):
        return None
    return {token: i for token, i in vocabulary.items() if token != END_OF_TEXT}, pairs


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_gpt2s(found: _BytePairs | None) -> bool:
    if found is None or len(found[0]) != GPT2Tokenizer.vocab_size - 1:
        return False
    files = gpt2_vocabulary_files()
    vocabulary = json.loads(files["encoder.json"])
    del vocabulary[END_OF_TEXT]
    merges = [line for line in files["vocab.bpe"].decode().split("\n")[1:] if line]
    return found == (vocabulary, merges)
