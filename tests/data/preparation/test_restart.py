"""What `prepare` does if its input, its folder or the disk changes between runs or during one."""

import builtins
import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from homebrew.data.preparation import plan, state
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
        try:
            prepare(text, tmp_path / "b.npy", **options)
        except Killed:
            pass
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
