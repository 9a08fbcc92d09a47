"""Checks a tokenizer's settings in transformers' format: every field except vocabulary and merges."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from homebrew.data.gpt2_vocabulary import END_OF_TEXT
from homebrew.data.tokenizer import CharTokenizer, Tokenizer
from homebrew.data.tokenizer_json import BYTE_LEVEL_BPE, different_fields, different_post_processor
from homebrew.hub.model_folder import find_file, read_json
from homebrew.hub.tokenizer_files import ANY_CHARACTER, UNKNOWN_CHARACTER

_Json = Mapping[str, Any]

_CHAR_PIPELINE: dict[str, tuple[Any, ...]] = {
    "normalizer": (None,),
    "pre_tokenizer.type": ("Split",),
    "pre_tokenizer.pattern": ({"Regex": ANY_CHARACTER},),
    "pre_tokenizer.behavior": ("Isolated",),
    "pre_tokenizer.invert": (False,),
    "decoder.type": ("Fuse",),
    "model.type": ("WordLevel",),
    "model.unk_token": (UNKNOWN_CHARACTER,),
}
"""Supported values in `tokenizer.json` of an exported `CharTokenizer`."""

_CONFIG: dict[str, tuple[Any, ...]] = {
    "tokenizer_class": ("GPT2Tokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend", None),
    "auto_map": (None,),
    "add_prefix_space": (False, None),
    "add_bos_token": (False, None),
    "add_eos_token": (False, None),
}
"""Supported values in `tokenizer_config.json` of any tokenizer."""


def unsupported_settings(folder: Path, tokenizer: Tokenizer, pipeline: _Json) -> list[str]:
    """Return the settings in which a folder's tokenizer, in transformers' format, differs from `tokenizer`.

    Args:
        folder: Folder with the tokenizer's files.
        tokenizer: Built-in tokenizer with the same vocabulary and merges.
        pipeline: Contents of the folder's `tokenizer.json`; empty if there is no such file.
    """
    config, special_tokens, added_tokens = (
        read_json(path) if (path := find_file(folder, name)) is not None else {}
        for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    )
    fields = list(different_fields(config, _CONFIG))
    if pipeline:
        is_char = isinstance(tokenizer, CharTokenizer)
        fields += different_fields(pipeline, _CHAR_PIPELINE if is_char else BYTE_LEVEL_BPE)
        fields += different_post_processor(pipeline)
    differences = [_format(name, value) for name, value in fields]
    end_of_text = None if tokenizer.end_of_text_id is None else END_OF_TEXT
    for values in (config, special_tokens):
        for name in values:
            if name.endswith(("_token", "special_tokens")):  # such as eos_token; transformers accepts any name
                differences += [_format(name, token) for token in _contents(values[name]) if token != end_of_text]
    for content, token_id in _added_tokens(pipeline, config, added_tokens):
        if (content, str(token_id)) != (end_of_text, str(tokenizer.end_of_text_id)):
            differences.append(f"{_format('added token', content)} with id {token_id}")
    return list(dict.fromkeys(differences))  # several files may have the same field


def _added_tokens(pipeline: _Json, config: _Json, added_tokens: _Json) -> Iterator[tuple[str, object]]:
    """Yield the content and the id of each added token."""
    yield from added_tokens.items()
    by_id = config.get("added_tokens_decoder")
    for token_id, token in by_id.items() if isinstance(by_id, dict) else ():
        yield from ((content, token_id) for content in _contents(token))
    tokens = pipeline.get("added_tokens")
    for token in tokens if isinstance(tokens, list) else ():
        yield from ((content, isinstance(token, dict) and token.get("id")) for content in _contents(token))


def _contents(value: object) -> list[str]:
    """Return the texts of a token, which is a string or an object with `content`, or of a collection of tokens."""
    if isinstance(value, dict):
        return [value["content"]] if "content" in value else [text for v in value.values() for text in _contents(v)]
    if isinstance(value, list):
        return [text for v in value for text in _contents(v)]
    return [value] if isinstance(value, str) else []


def _format(name: str, value: object) -> str:
    return f"{name}={value!r:.100}"
