"""What `prepare` does if its input, its folder or the disk changes between runs or during one."""

import contextlib
import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from homebrew import TokenDataset
from homebrew.data.preparation import plan, state
from homebrew.data.preparation import prepare as prepare_module
from homebrew.data.preparation.encode_part import PartEncoder
from homebrew.data.preparation.prepare import prepare
from homebrew.data.preparation.state import PrepareState
from homebrew.errors import DataError


class Killed(BaseException):
    """Ends a run without an error that it would handle."""


def tokens_of(folder, pattern="b*.npy"):
    return [i for path in sorted(folder.glob(pattern)) for i in np.load(path).tolist()]


@pytest.fixture
def text(tmp_path, monkeypatch):
    """A file of 20 parts, each a document."""
    monkeypatch.setattr(plan, "PART_BYTES", 1)
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i:02}"}) + "\n" for i in range(20)))
    os.utime(path, (0, 0))  # the time of a change differs on any clock
    return path


ALL = "".join(f"{i:02}" for i in range(20)).encode()


@pytest.mark.parametrize("number", [*range(1, 25, 4), 30, 40, 50, 60, 70])
def test_a_run_that_is_killed_while_it_removes_its_parts_is_continued(text, tmp_path, monkeypatch, number):
    options = {"tokenizer": "bytes", "shard_tokens": 9, "workers": 1}
    remaining = number
    unlink = Path.unlink

    def kill_or_unlink(self, **arguments):
        nonlocal remaining
        if self.parent.name == "b.partial" and not self.name.startswith("."):
            remaining -= 1
            if remaining == 0:
                raise Killed
        unlink(self, **arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", kill_or_unlink)
        with contextlib.suppress(Killed):
            prepare(text, tmp_path / "b.npy", **options)
    prepare(text, tmp_path / "b.npy", **options)
    assert bytes(tokens_of(tmp_path)) == ALL
    assert not (tmp_path / "b.partial").exists()


@pytest.mark.parametrize("removed", [["000003.json"], ["000003.json", "000005.json", "000000.json"], ["000019.json"]])
@pytest.mark.parametrize("split", ["train", "val"])
def test_parts_whose_counts_are_missing_are_encoded_again(text, tmp_path, monkeypatch, removed, split):
    options = {"tokenizer": "bytes", "shard_tokens": 4, "workers": 1, "val_fraction": 0.5}
    prepare(text, tmp_path / "expected" / "b.npy", **options)
    with monkeypatch.context() as patch:
        patch.setattr(PrepareState, "remove_parts", lambda self, first=0: None)
        prepare(text, tmp_path / "b.npy", **options)
    for name in removed:
        (tmp_path / "b.partial" / name).unlink()
    last = max(tmp_path.glob(f"b-{split}-*.npy"))
    for file in (last, last.with_suffix(".json")):
        file.unlink()
    prepare(text, tmp_path / "b.npy", **options)
    assert tokens_of(tmp_path) == tokens_of(tmp_path / "expected")


CHANGES = {
    "another text": lambda path: path.write_text(path.read_text().replace("05", "55")),
    "a longer text": lambda path: path.write_text(path.read_text() + '{"text": "20"}'),
    "a shorter text": lambda path: path.write_text(path.read_text()[:100]),
    "a new file": lambda path: Path(shutil.copy(path, f"{path}.new")).replace(path),
    "a later time": lambda path: path.touch(),
    "no file": lambda path: path.unlink(),
}


@pytest.mark.parametrize(
    ("change", "tokenizer", "number"),
    [
        *((name, "bytes", 7) for name in CHANGES),
        ("another text", "char", 7),
        ("another text", "gpt2", 7),
        ("a shorter text", "bytes", 0),
        ("a longer text", "bytes", 19),
    ],
)
def test_an_input_that_changes_during_the_run_is_an_error(text, tmp_path, monkeypatch, change, tokenizer, number):
    encode = PartEncoder.encode

    def change_and_encode(self, index, spans):
        if index == number:
            CHANGES[change](text)
        return encode(self, index, spans)

    monkeypatch.setattr(PartEncoder, "encode", change_and_encode)
    with pytest.raises(DataError, match=r"a\.jsonl"):
        prepare(text, tmp_path / "b.npy", tokenizer=tokenizer, workers=1)
    assert not (tmp_path / "b.npy").exists()


def test_an_input_that_changes_while_its_alphabet_is_read_is_an_error(text, tmp_path, monkeypatch):
    alphabet = prepare_module._alphabet

    def read_and_change(*arguments):
        result = alphabet(*arguments)
        text.touch()
        return result

    monkeypatch.setattr(prepare_module, "_alphabet", read_and_change)
    with pytest.raises(DataError, match=r"a\.jsonl.* changed"):
        prepare(text, tmp_path / "b.npy", tokenizer="char", workers=1)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_change_of_any_file_of_a_part_is_found(tmp_path, monkeypatch, workers):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name)
    parts_of_plan = plan.plan_parts

    def plan_and_change(*arguments, **options):
        parts = parts_of_plan(*arguments, **options)
        (tmp_path / "b.txt").write_text("other")
        return parts

    monkeypatch.setattr(prepare_module, "plan_parts", plan_and_change)
    with pytest.raises(DataError, match=r"b\.txt.* changed"):
        prepare(tmp_path, tmp_path / "b.npy", tokenizer="bytes", workers=workers)


@pytest.mark.parametrize("alphabet", ["0123456789", "0123456789x"])
@pytest.mark.parametrize("changed", [0, 9, 19])
def test_a_changed_input_starts_over_with_its_alphabet(text, tmp_path, monkeypatch, alphabet, changed):
    options = {"tokenizer": "char", "shard_tokens": 9, "workers": 1}
    files = [tmp_path / f"{i:02}.txt" for i in range(20)]
    for file in files:
        file.write_text(file.stem)
    encode = PartEncoder.encode

    def encode_some(self, index, spans):
        if index == 12:
            raise Killed
        return encode(self, index, spans)

    with monkeypatch.context() as patch:
        patch.setattr(PartEncoder, "encode", encode_some)
        with pytest.raises(Killed):
            prepare(files, tmp_path / "b.npy", **options)
    files[changed].write_text(alphabet)
    for folder in ("", "expected"):
        prepare(files, tmp_path / folder / "b.npy", **options)
    assert tokens_of(tmp_path) == tokens_of(tmp_path / "expected")
    assert TokenDataset.from_file(str(tmp_path / "b-*.npy"), 4).tokenizer.alphabet == alphabet


@pytest.mark.parametrize("name", ["b" * 250, "b" * 248, "b" * 247])
@pytest.mark.parametrize("options", [{}, {"shard_tokens": 9}, {"val_fraction": 0.5}])
def test_a_name_that_is_too_long_is_an_error_that_names_it(text, tmp_path, name, options):
    with pytest.raises(DataError, match=rf"{name}.*too long"):
        prepare(text, tmp_path / "out" / f"{name}.npy", tokenizer="bytes", workers=1, **options)


@pytest.mark.parametrize("function", ["write_plan", "part", "remove_parts", "num_unchanged"])
def test_a_full_disk_is_an_error_that_names_the_file(text, tmp_path, monkeypatch, function):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "b.partial" / "plan.json"))

    monkeypatch.setattr(PrepareState, function, fail)
    with pytest.raises(DataError, match=r"b\.partial.*No space left"):
        prepare(text, tmp_path / "b.npy", tokenizer="bytes", workers=1)


def test_a_folder_that_is_removed_before_it_is_locked_is_an_error(text, tmp_path, monkeypatch):
    flock = state.fcntl.flock

    def remove_and_lock(descriptor, operation):
        (tmp_path / "b.partial").rmdir()
        flock(descriptor, operation)

    monkeypatch.setattr(state.fcntl, "flock", remove_and_lock)
    with pytest.raises(DataError, match=r"b\.partial is in use by another process"):
        prepare(text, tmp_path / "b.npy", tokenizer="bytes", workers=1)


@pytest.mark.parametrize("tokenizer", ["char", "bytes", "gpt2"])
@pytest.mark.parametrize("content", ["", '{"text": ""}\n', "\n"])
def test_no_text_is_an_error_for_every_tokenizer(tmp_path, tokenizer, content):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(DataError, match=r"no text to prepare in the file .*a\.jsonl"):
        prepare(tmp_path / "a.jsonl", tmp_path / "b.npy", tokenizer=tokenizer)


@pytest.mark.parametrize("tokenizer", ["char", "bytes"])
@pytest.mark.parametrize("paths", [[], (), iter([])])
def test_an_empty_list_of_files_is_an_error(tmp_path, tokenizer, paths):
    with pytest.raises(DataError, match="list of files is empty"):
        prepare(paths, tmp_path / "b.npy", tokenizer=tokenizer)
