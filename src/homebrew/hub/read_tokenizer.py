"""Reads the tokenizer of a model folder, if it is one that homebrew supports."""

import json
from pathlib import Path
from typing import Any

from homebrew.bounded_readers import MAX_BYTES
from homebrew.constants import TOKENIZER_FILE
from homebrew.data.byte_pair_tokenizer import BytePairTokenizer
from homebrew.data.gpt2_tokenizer import GPT2Tokenizer
from homebrew.data.gpt2_vocabulary import END_OF_TEXT, gpt2_vocabulary_files
from homebrew.data.tokenizer import Tokenizer, saved_tokenizer
from homebrew.data.tokenizer_json import Vocabulary, parse_pipeline, pipeline_vocabulary
from homebrew.errors import DataError, ModelError
from homebrew.hub.model_folder import find_file, read_bounded_text, read_json
from homebrew.hub.tokenizer_files import HOMEBREW_FILE, tokenizer_files
from homebrew.hub.tokenizer_settings import unsupported_settings

_OTHER = Vocabulary({}, [])
"""Placeholder for the vocabulary of a tokenizer of another kind."""

_MAX_BYTES = 5 * 2**20
"""Maximum size of a `tokenizer.json` that homebrew has not written. GPT-2's has 3.6 MB; larger files belong to other
tokenizers and are not read."""


def read_tokenizer(folder: Path, *, vocab_size: int) -> Tokenizer | None:
    """Read the tokenizer of a model folder.

    Supported are tokenizers exported by homebrew; GPT-2's tokenizer, recognized by its vocabulary and merges; and any
    byte-level BPE in a `tokenizer.json` that `get_tokenizer` opens.

    Returns:
        The tokenizer, or None if the folder has none or one of another kind. For a custom tokenizer, None, with a
        warning.

    Raises:
        ModelError: A file is invalid, the tokenizer is a variant of a supported one, such as one with added tokens,
            it has more ids than the model, or the folder's files contradict each other.
        TokenizerError: GPT-2's vocabulary is not available.
    """
    path = find_file(folder, HOMEBREW_FILE)
    pipeline = _read_pipeline(folder, _MAX_BYTES if path is None else MAX_BYTES)
    vocabulary = _read_vocabulary(folder) if pipeline is None else pipeline_vocabulary(pipeline) or _OTHER
    tokenizer: Tokenizer | None
    if path is not None:
        tokenizer = saved_tokenizer(read_json(path), path, ModelError)
    else:
        tokenizer = GPT2Tokenizer() if _is_gpt2(vocabulary) else _byte_pair_tokenizer(pipeline or {})
    if tokenizer is None:
        return None
    if path is not None and vocabulary not in (None, _exported_vocabulary(tokenizer)):
        raise ModelError(  # transformers may have saved another tokenizer here
            f"The tokenizer in {folder} has other tokens or merges than the tokenizer {tokenizer.name!r} in "
            f"{HOMEBREW_FILE}. Restore the tokenizer's files, or remove {HOMEBREW_FILE}."
        )
    if settings := unsupported_settings(folder, tokenizer, pipeline or {}):
        if path is None and isinstance(tokenizer, BytePairTokenizer):
            return None
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


def _read_pipeline(folder: Path, max_bytes: int) -> dict[str, Any] | None:
    """Read `tokenizer.json`, which AutoTokenizer also prefers to other files. Return {} if the file is too large."""
    path = find_file(folder, TOKENIZER_FILE)
    if path is None:
        return None
    return read_json(path) if path.stat().st_size <= max_bytes else {}


def _byte_pair_tokenizer(pipeline: dict[str, Any]) -> BytePairTokenizer | None:
    """Return the tokenizer of a `tokenizer.json` that homebrew has not written, or None if it is of another kind."""
    try:
        return parse_pipeline(pipeline)
    except DataError:
        return None


def _read_vocabulary(folder: Path) -> Vocabulary | None:
    """Read `vocab.json` and `merges.txt`. Return None if the folder has neither."""
    path, merges_path = find_file(folder, "vocab.json"), find_file(folder, "merges.txt")
    if path is not None and merges_path is not None:
        return Vocabulary(read_json(path), _split_merges(read_bounded_text(merges_path)))
    return None if path is merges_path is None else _OTHER


def _is_gpt2(vocabulary: Vocabulary | None) -> bool:
    if vocabulary is None:
        return False
    ids = {END_OF_TEXT: GPT2Tokenizer.end_of_text_id, **vocabulary.ids}
    is_as_large = len(ids) == GPT2Tokenizer.vocab_size  # if not, do not read GPT-2's files
    return is_as_large and vocabulary._replace(ids=ids) == _exported_vocabulary(GPT2Tokenizer())


def _exported_vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """Return the vocabulary of a tokenizer's exported files."""
    if isinstance(tokenizer, GPT2Tokenizer):  # read its merges, because deriving them takes seconds
        source = gpt2_vocabulary_files()
        return Vocabulary(json.loads(source["encoder.json"]), _split_merges(source["vocab.bpe"].decode()))
    files = tokenizer_files(tokenizer, model_max_length=1, is_gpt=True)
    if TOKENIZER_FILE in files:
        return pipeline_vocabulary(json.loads(files[TOKENIZER_FILE])) or _OTHER
    return Vocabulary(json.loads(files["vocab.json"]), _split_merges(files["merges.txt"]))


def _split_merges(text: str) -> list[str]:
    return [line for line in text.split("\n") if line and not line.startswith("#version")]
