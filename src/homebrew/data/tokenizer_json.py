"""The file `tokenizer.json` of a byte-level BPE, as Hugging Face's tokenizers library reads and writes it."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from homebrew.bounded_readers import parse_json, read_bytes, read_json
from homebrew.constants import TOKENIZER_FILE
from homebrew.data.byte_pair_tokenizer import BytePairTokenizer
from homebrew.data.gpt2_vocabulary import END_OF_TEXT
from homebrew.data.tiktoken_tokenizer import to_notation
from homebrew.errors import DataError
from homebrew.io import absolute_path, atomic_replace, strict_json, write_errors

BYTE_LEVEL_BPE: dict[str, tuple[Any, ...]] = {
    "normalizer": (None,),
    "pre_tokenizer.type": ("ByteLevel",),
    "pre_tokenizer.add_prefix_space": (False,),
    "pre_tokenizer.use_regex": (True, None),
    "decoder.type": ("ByteLevel",),
    "model.type": ("BPE", None),
    "model.dropout": (None,),
    "model.continuing_subword_prefix": ("", None),
    "model.end_of_word_suffix": ("", None),
    "model.byte_fallback": (False, None),
    "model.ignore_merges": (False, None),
}
"""Fields of `tokenizer.json` that affect the ids or the decoded text, with the values that GPT-2's tokenizer has."""

OTHER_TOKENIZERS = (
    "Or encode the text with transformers and pass only the ids, to "
    "TokenDataset.from_tokens(tokenizer(text).input_ids, …) or model.generate([tokenizer(text).input_ids], …)."
)
"""How to use a tokenizer that homebrew does not support."""

_CHOOSE_FOLDER = "Choose a folder that can be written to."
_ASK_FOR_TEXT = (
    "For nanoGPT's character data, use the tokenizer 'char' with the text that the data was made from, such as "
    "input.txt."
)


class Vocabulary(NamedTuple):
    """The tokens of a tokenizer."""

    ids: Mapping[str, Any]
    """Id of each token."""
    merges: list[str]
    """The merges as "a b", in their order."""


def open_tokenizer_json(path: str | Path) -> BytePairTokenizer:
    """Open a `tokenizer.json`, or the one in a folder.

    Raises:
        DataError: The file does not exist, is not valid, or has a tokenizer that is not a byte-level BPE with GPT-2's
            rules for splitting words.
    """
    path = Path(os.path.realpath(absolute_path(path)))  # files in the Hub's cache are links
    if path.is_dir() and not (path / TOKENIZER_FILE).is_file():
        advice = (
            _ASK_FOR_TEXT
            if (path / "meta.pkl").exists()
            else f"Give the folder or file of a tokenizer. {OTHER_TOKENIZERS}"
        )
        raise DataError(f"The folder {path} has no {TOKENIZER_FILE}. {advice}")
    if path.is_dir():
        path = Path(os.path.realpath(path / TOKENIZER_FILE))
    data = read_bytes(path, DataError)
    if path.suffix in (".pkl", ".pickle") or data.startswith(b"\x80"):  # a pickle's first byte, which no JSON has
        raise DataError(
            f"{path} is a pickle, which can run any code when it is read, so it is not read. {_ASK_FOR_TEXT}"
        )
    pipeline = parse_json(data, path, DataError)
    try:
        return parse_pipeline(pipeline)
    except DataError as error:
        raise DataError(f"The tokenizer in {path} is not supported: {error} {OTHER_TOKENIZERS}") from error


def format_tokenizer_json(tokenizer: BytePairTokenizer) -> str:
    """Return the text of the `tokenizer.json` of a byte-level BPE."""
    return strict_json(pipeline_of(tokenizer), ensure_ascii=False) + "\n"


def byte_level_pipeline(
    vocabulary: Mapping[str, int], merges: Sequence[str], end_of_text_id: int | None
) -> dict[str, Any]:
    """Return the contents of the `tokenizer.json` of a byte-level BPE.

    Args:
        vocabulary: Id of each token, in the notation of GPT-2's vocabulary files.
        merges: The merges as "a b", in their order.
        end_of_text_id: Id of "<|endoftext|>", if it is a token.
    """
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    end_of_text = {
        "id": end_of_text_id,
        "content": END_OF_TEXT,
        **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
        "special": True,
    }
    return {
        "version": "1.0",
        **dict.fromkeys(("truncation", "padding", "normalizer", "post_processor")),
        "added_tokens": [] if end_of_text_id is None else [end_of_text],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            **dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")),
            **dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False),
            "vocab": dict(vocabulary),
            "merges": list(merges),
        },
    }


def pipeline_of(tokenizer: BytePairTokenizer) -> dict[str, Any]:
    """Return the contents of a tokenizer's `tokenizer.json`."""
    vocabulary = {token: i for i, token in enumerate(tokenizer.tokens)}
    merges = [f"{to_notation(a)} {to_notation(b)}" for a, b in tokenizer.merges]
    return byte_level_pipeline(vocabulary, merges, tokenizer.end_of_text_id)


def write_tokenizer_json(tokenizer: BytePairTokenizer, path: Path) -> None:
    """Write a `tokenizer.json`."""
    with write_errors(path, DataError, _CHOOSE_FOLDER), atomic_replace(path) as temporary:
        temporary.write_bytes(format_tokenizer_json(tokenizer).encode())


def check_tokenizer_path(path: Path) -> None:
    """Check that a `tokenizer.json` can be written to a path, and create its folder. Other files are not replaced."""
    if path.exists() and "model" not in read_json(path, DataError):
        raise DataError(f"{path} exists and is not a {TOKENIZER_FILE}, so it is not replaced. Choose another path.")
    with write_errors(path, DataError, _CHOOSE_FOLDER):
        path.parent.mkdir(parents=True, exist_ok=True)


def pipeline_vocabulary(pipeline: Mapping[str, Any]) -> Vocabulary | None:
    """Return the vocabulary in the contents of a `tokenizer.json`, or None if its model has none of this kind."""
    match pipeline:
        case {"model": {"vocab": dict(ids), **model}} if isinstance(merges := model.get("merges", []), list):
            pairs: list[Any] = [" ".join(pair) if _is_string_list(pair) else pair for pair in merges]
            if _is_string_list(pairs):
                return Vocabulary(ids, pairs)
    return None


def different_fields(values: Mapping[str, Any], supported: Mapping[str, tuple[Any, ...]]) -> Iterator[tuple[str, Any]]:
    """Yield the fields of a JSON object, such as "model.type", whose value is not among the supported ones."""
    for path, allowed in supported.items():
        value: Any = values
        for name in path.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if not any(type(value) is type(one) and value == one for one in allowed):  # True == 1
            yield path, value


def different_post_processor(pipeline: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the post-processor of a `tokenizer.json` if it changes the ids of a text."""
    match pipeline.get("post_processor"):
        case None | {"type": "ByteLevel"} | {"type": "TemplateProcessing", "single": [{"Sequence": _}]}:
            return
    yield "post_processor", pipeline["post_processor"]


def parse_pipeline(pipeline: Mapping[str, Any]) -> BytePairTokenizer:
    """Build the tokenizer of the contents of a `tokenizer.json`; raise DataError if it is not supported."""
    differences = [*different_fields(pipeline, BYTE_LEVEL_BPE), *different_post_processor(pipeline)]
    if differences:
        names = ", ".join(f"{name}={value!r:.100}" for name, value in differences)
        raise DataError(f"it has {names}. Use a byte-level BPE like GPT-2's, such as `homebrew tokenizer train` makes.")
    vocabulary = pipeline_vocabulary(pipeline)
    if vocabulary is None:
        raise DataError("its model has no vocabulary and merges. Use a byte-level BPE.")
    ids = {**vocabulary.ids, **_added_ids(pipeline.get("added_tokens") or [])}
    tokens = {i: token for token, i in ids.items() if type(i) is int}
    if sorted(tokens) != list(range(len(ids))):
        raise DataError(f"the ids of its {len(ids)} tokens are not 0 to {len(ids) - 1}. Give each one id.")
    tokenizer = BytePairTokenizer([tokens[i] for i in range(len(tokens))])
    if vocabulary.merges != pipeline_of(tokenizer)["model"]["merges"]:
        raise DataError("its merges are not those of its tokens in the order of their ids. Train it again.")
    return tokenizer


def _added_ids(tokens: object) -> dict[str, Any]:
    """Return the id of "<|endoftext|>" if it is an added token, the only one that is supported."""
    match tokens:
        case []:
            return {}
        case [{"content": str(content), "id": token_id}] if content == END_OF_TEXT:
            return {END_OF_TEXT: token_id}
    names = ", ".join(
        repr(token["content"] if isinstance(token, dict) and "content" in token else token)
        for token in (tokens if isinstance(tokens, Sequence) else [tokens])
    )
    raise DataError(f"its added tokens are {names:.300}, but only {END_OF_TEXT!r} is supported. Remove the others.")


def _is_string_list(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
