"""Which files `prepare` writes and removes: no file of an earlier run passes for one of this run."""

import hashlib
import json

import pytest

from homebrew.data.preparation.prepare import prepare
from homebrew.errors import DataError


def write_jsonl(path, *texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def is_val(text):
    """Return whether a document is for validation at val_fraction=0.5."""
    return hashlib.blake2b(text.encode(), digest_size=8).digest()[0] < 128


EMPTY_IS_VAL = is_val("")
WITH_EMPTY = [text for text in map(str, range(40)) if is_val(text) == EMPTY_IS_VAL]
OTHERS = [text for text in map(str, range(40)) if is_val(text) != EMPTY_IS_VAL]


@pytest.mark.parametrize("shard_tokens", [None, 3])
@pytest.mark.parametrize("num_empty", [1, 2])
@pytest.mark.parametrize("has_earlier", [False, True])
def test_a_split_without_text_is_an_error(tmp_path, shard_tokens, num_empty, has_earlier):
    options = {"val_fraction": 0.5, "shard_tokens": shard_tokens, "workers": 1}
    text = tmp_path / "text.jsonl"
    if has_earlier:
        prepare(write_jsonl(text, *WITH_EMPTY, *OTHERS), tmp_path / "b.npy", **options)
    write_jsonl(text, *OTHERS, *[""] * num_empty)
    with pytest.raises(DataError, match=f"none with text is for {'val' if EMPTY_IS_VAL else 'train'}"):
        prepare(text, tmp_path / "b.npy", **options)


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_one_empty_document_beside_none_is_an_error(tmp_path, fraction):
    with pytest.raises(DataError, match="no text to prepare"):
        prepare(write_jsonl(tmp_path / "a.jsonl", ""), tmp_path / "b.npy", val_fraction=fraction)
