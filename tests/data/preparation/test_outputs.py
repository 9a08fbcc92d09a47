"""Which files `prepare` writes and removes: no file of an earlier run passes for one of this run."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from homebrew.data.preparation import plan
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


def tokens_of(folder, pattern="b-*.npy"):
    return [i for path in sorted(folder.glob(pattern)) for i in np.load(path).tolist()]


@pytest.mark.parametrize("name", ["b-20240101.npy", "b-00007.npy", "b-123456.npy"])
def test_token_files_that_are_no_shards_of_the_run_stay(tmp_path, name):
    text = tmp_path / "a.txt"
    text.write_text("To be, or not")
    prepare(text, tmp_path / name, tokenizer="bytes")
    for shard_tokens in (4, 5, 4):
        prepare(text, tmp_path / "b.npy", tokenizer="bytes", shard_tokens=shard_tokens)
        assert bytes(tokens_of(tmp_path, name)) == b"To be, or not"
        assert len([*tmp_path.glob("b-0000[0-6].npy")]) == -(-13 // shard_tokens)


def test_shards_are_removed_from_the_last_one_on(tmp_path, monkeypatch):
    text = tmp_path / "a.txt"
    text.write_text("To be, or not")
    prepare(text, tmp_path / "b.npy", tokenizer="bytes", shard_tokens=2)
    removed = []
    unlink = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda self, **options: (removed.append(self), unlink(self, **options))[1])
    prepare(text, tmp_path / "b.npy", tokenizer="bytes", shard_tokens=9)
    shards = [path.stem for path in removed if path.parent == tmp_path and path.name.startswith("b-")]
    assert shards == [f"b-{i:05}" for i in range(6, -1, -1) for _ in range(2)]


BAD_INPUTS = {
    "a bad field": ("a.jsonl", '{"body": "To be"}', {}),
    "no JSON": ("a.jsonl", "To be", {"workers": 1}),
    "not UTF-8": ("a.txt", b"\xff", {}),
    "no text": ("a.txt", "", {}),
    "no text for val": ("a.txt", "To be", {"val_fraction": 1e-9}),
    "no text for train": ("a.txt", "To be", {"val_fraction": 1 - 1e-9}),
}


@pytest.mark.parametrize(("name", "content", "options"), BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_a_run_that_writes_no_shard_keeps_those_of_an_earlier_run(tmp_path, name, content, options):
    out = tmp_path / "out"
    write_jsonl(tmp_path / "good.jsonl", *map(str, range(40)))
    splits = {"val_fraction": 0.5} if "val_fraction" in options else {}
    prepare(tmp_path / "good.jsonl", out / "b.npy", tokenizer="bytes", shard_tokens=5, **splits)
    before = contents(out)
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    for _ in range(2):
        with pytest.raises(DataError):
            prepare(tmp_path / name, out / "b.npy", tokenizer="bytes", shard_tokens=9, **options)
        assert contents(out) == before


def test_shards_of_an_earlier_run_do_not_count_as_those_of_a_run_without_any(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "PART_BYTES", 40)
    options = {"tokenizer": "bytes", "shard_tokens": 20, "workers": 1}
    write_jsonl(tmp_path / "old.jsonl", *"abcdefghijklmnopqrstuvwxyz" * 5)
    prepare(tmp_path / "old.jsonl", tmp_path / "b.npy", **options)
    before = contents(tmp_path)
    text = tmp_path / "new.jsonl"
    text.write_text('{"text": "To be, or"}\n' + 9 * " " + "\n" + " " * 40 + "\n{}\n" + " " * 40)
    with pytest.raises(DataError, match="no field"):
        prepare(text, tmp_path / "b.npy", **options)
    assert (tmp_path / "b.partial").is_dir()  # a part is complete, but no shard is
    assert before.items() <= contents(tmp_path).items()
    text.write_text('{"text": "To be, or"}\n' + 9 * " " + "\n" + " " * 40 + '\n{"text": " not to be"}\n')
    prepare(text, tmp_path / "b.npy", **options)
    assert bytes(tokens_of(tmp_path)) == b"To be, or not to be"


@pytest.mark.parametrize(
    ("shard_tokens", "name"), [(None, "b"), (2, "b-00000"), (2, "b-00003"), (2, "b-00006"), (9, "b-00007")]
)
@pytest.mark.parametrize("suffix", ["npy", "json"])
def test_temporary_files_of_killed_runs_are_removed(tmp_path, shard_tokens, name, suffix):
    text = tmp_path / "a.txt"
    text.write_text("To be, or not")
    prepare(text, tmp_path / "b.npy", tokenizer="bytes", shard_tokens=2)
    leftover = tmp_path / f".{name}.{suffix}.0123abcd"
    others = [tmp_path / f".{other}.0123abcd" for other in ("b-20240101.npy", "b-c.npy", "bb-00000.npy", "b-00000.txt")]
    for file in (leftover, *others):
        file.touch()
    prepare(text, tmp_path / "b.npy", tokenizer="bytes", shard_tokens=shard_tokens)
    assert not leftover.exists()
    assert all(file.exists() for file in others)
