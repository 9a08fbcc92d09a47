import errno
import itertools
import json
import os
import stat

import pytest
import torch

from homebrew.checkpoint.manifest import open_checkpoint
from homebrew.checkpoint.store import CheckpointStore
from homebrew.errors import CheckpointError, ConfigError, CorruptCheckpoint


def equal(a, b):
    return a.keys() == b.keys() and all(
        a[file].keys() == b[file].keys()
        and all(
            a[file][name].dtype == b[file][name].dtype and torch.allclose(a[file][name], b[file][name], equal_nan=True)
            for name in a[file]
        )
        for file in a
    )


def names(store):
    return sorted(path.name for path in store.folder.iterdir())


def folders(*steps):
    return [f"step-{step:08}" for step in steps]


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_save_and_load(store, tiny, kind):
    path = store.save(7, tiny[kind](7), tiny["state"], score=2)
    checkpoint, invalid = store.latest()
    assert (checkpoint.path, checkpoint.step, checkpoint.state, invalid) == (path, 7, tiny["state"], [])
    assert set(checkpoint.names) == set(tiny[kind](7))
    assert equal(checkpoint.files(), tiny[kind](7))


def test_an_empty_store(tmp_path):
    assert CheckpointStore(tmp_path / "missing").latest() == (None, [])
    assert CheckpointStore(tmp_path / "missing").steps() == []


def test_modes_follow_the_umask(store, tiny):
    before = os.umask(0o027)
    try:
        path = store.save(1, tiny["full"](1), tiny["state"])
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o750
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o640}


def test_a_folder_that_cannot_be_created(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written to: File exists"):
        CheckpointStore(tmp_path / "file").prepare()


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_a_folder_that_cannot_be_listed_is_an_error_with_its_path(store, monkeypatch, number):
    def listdir(path):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(os, "listdir", listdir)
    with pytest.raises(CheckpointError, match=f"{store.folder} cannot be listed: {os.strerror(number)}"):
        store.latest()


def test_a_deleted_folder_is_created_again(store, tiny):
    store.folder.rmdir()
    store.save(1, tiny["full"](1), tiny["state"])
    assert store.steps() == [1]


# --- pruning


def save_all(store, tiny, scores):
    for step, score in scores.items():
        store.save(step, tiny["adapter"](step), tiny["state"], score=score)


def test_keeps_the_last_every_kth_and_the_best(tmp_path, tiny):
    store = CheckpointStore(tmp_path, keep_last=2, keep_every=4)
    save_all(store, tiny, {1: 3.0, 2: None, 3: 1.0, 4: 2.0, 5: float("nan"), 6: float("inf"), 7: 1.5})
    assert store.steps() == [3, 4, 6, 7]


@pytest.mark.parametrize(("keep_before", "kept"), [(0, [5]), (2, [2, 5]), (4, [3, 5]), (9, [5])])
def test_keeps_the_newest_up_to_a_step(tmp_path, tiny, keep_before, kept):
    store = CheckpointStore(tmp_path, keep_last=1, keep_before=keep_before)
    save_all(store, tiny, {1: None, 2: None, 3: None, 5: None})
    assert store.steps() == kept


def test_corrupt_checkpoints_neither_count_nor_are_removed(tmp_path, tiny):
    store = CheckpointStore(tmp_path, keep_last=2)
    save_all(store, tiny, {1: None, 2: None})
    (store.path(2) / "adapter.safetensors").write_bytes(b"short")
    save_all(store, tiny, {3: None})
    assert store.steps() == [1, 2, 3]
    save_all(store, tiny, {4: None, 5: None})
    assert store.steps() == [2, 4, 5]


def test_checkpoints_of_an_earlier_process_are_verified_before_they_count(tmp_path, tiny):
    save_all(CheckpointStore(tmp_path, keep_last=3), tiny, {1: None, 2: None, 3: 0.5})
    for step in (2, 3):
        with (CheckpointStore(tmp_path).path(step) / "adapter.safetensors").open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"x")  # of the right size, but corrupt
    store = CheckpointStore(tmp_path, keep_last=2)
    save_all(store, tiny, {4: 0.7})
    assert store.steps() == [1, 2, 3, 4]
    save_all(store, tiny, {5: 0.9, 6: 0.9})
    assert store.steps() == [2, 3, 4, 5, 6]


def test_other_files_are_not_removed(tmp_path, tiny):
    store = CheckpointStore(tmp_path, keep_last=1)
    save_all(store, tiny, {1: None})
    (store.path(1) / "notes.txt").write_text("notes")
    (tmp_path / "elsewhere").mkdir()
    kept = ["best", "step-1", "step-00000000-copy", ".step-00000003.mine"]
    for name in kept:
        (store.folder / name).mkdir()
    store.path(2).symlink_to(tmp_path / "elsewhere")
    save_all(store, tiny, {3: None, 4: None, 5: None})
    assert names(store) == sorted([*kept, *folders(1, 2, 5)])


def test_after_resuming_from_an_older_step_new_checkpoints_are_kept(tmp_path, tiny):
    store = CheckpointStore(tmp_path, keep_last=1)
    save_all(store, tiny, {8: None, 4: None, 6: None})
    assert store.steps() == [6, 8]


def test_a_checkpoint_that_cannot_be_removed_is_a_warning_and_is_retried(tmp_path, tiny, monkeypatch):
    store = CheckpointStore(tmp_path, keep_last=1)
    save_all(store, tiny, {1: None})
    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", lambda *_, **__: (_ for _ in ()).throw(OSError(39, "Directory not empty")))
        with pytest.warns(UserWarning, match="step-00000001 could not be removed"):
            save_all(store, tiny, {2: None})
    save_all(store, tiny, {3: None})
    assert names(store) == folders(3)


def test_leftovers_of_a_kill_are_removed_by_the_next_start(tmp_path, tiny):
    store = CheckpointStore(tmp_path, keep_last=3)
    save_all(store, tiny, {1: None, 2: None, 3: None})  # 1 and 2 are what a kill before pruning leaves
    store.path(3).rename(store.folder / ".step-00000003.aside")
    for name in (".step-00000004.writing", ".step-00000000.removing"):
        (store.folder / name).mkdir()
        (store.folder / name / "model.safetensors").touch()
    store = CheckpointStore(tmp_path, keep_last=1)
    store.prepare()
    assert names(store) == folders(1, 2, 3)
    store.prune(3)
    assert names(store) == folders(3)


def test_pruning_reads_no_checkpoint_if_all_are_kept(tmp_path, tiny, monkeypatch):
    save_all(CheckpointStore(tmp_path), tiny, {1: None, 2: None})
    monkeypatch.setattr("homebrew.checkpoint.store.open_checkpoint", lambda path: pytest.fail("was read"))
    CheckpointStore(tmp_path).prune(2)


# --- another process prunes meanwhile


def test_a_checkpoint_removed_after_the_folder_was_listed_is_looked_for_again(tmp_path, tiny, monkeypatch):
    """With keep_last=1, the only listed checkpoint may be gone before it is opened, several times in a row."""
    other = CheckpointStore(tmp_path, keep_last=1)
    save_all(other, tiny, {1: None})
    steps = iter([2, 3])

    def open_late(path):
        for step in itertools.islice(steps, 1):
            save_all(other, tiny, {step: None})
        return open_checkpoint(path)

    monkeypatch.setattr("homebrew.checkpoint.store.open_checkpoint", open_late)
    checkpoint, reasons = CheckpointStore(tmp_path).latest()
    assert (checkpoint.step, reasons) == (3, [])


def test_an_older_checkpoint_is_not_taken_for_the_newest_because_another_was_removed(tmp_path, tiny, monkeypatch):
    other = CheckpointStore(tmp_path, keep_last=1)
    save_all(other, tiny, {1: 0.5, 2: 0.9})  # 1 is kept as the best
    steps = iter([3])

    def open_late(path):
        for step in steps:
            save_all(other, tiny, {step: 0.9})
        return open_checkpoint(path)

    monkeypatch.setattr("homebrew.checkpoint.store.open_checkpoint", open_late)
    checkpoint, reasons = CheckpointStore(tmp_path).latest()
    assert (checkpoint.step, reasons) == (3, [])


# --- saving a step again


def test_a_step_saved_again_replaces_the_first(store, tiny):
    store.save(4, tiny["full"](4), tiny["state"])
    store.save(4, tiny["full"](5), tiny["state"])
    assert equal(store.latest()[0].files(), tiny["full"](5))
    assert names(store) == folders(4)


def test_a_checkpoint_moved_aside_is_found_and_restored(store, tiny):
    path = store.save(4, tiny["full"](4), tiny["state"])
    path.rename(store.folder / ".step-00000004.aside")
    assert store.steps() == [4]
    assert equal(store.latest()[0].files(), tiny["full"](4))
    store.save(6, tiny["full"](6), tiny["state"])
    assert names(store) == folders(4, 6)


# --- refused saves


@pytest.mark.parametrize(
    ("step", "tensors", "state"),
    [
        (10**8, {}, {}),
        (-1, {}, {}),
        (1, {}, {"text": "x" * 2**24}),
        (1, {}, {"numbers": [0] * 2**20}),
        (1, {f"w{i}": torch.ones(()) for i in range(2**16 + 1)}, {}),
        (1, {"w": torch.ones([1] * 65)}, {}),
    ],
    ids=["step", "negative step", "large state", "many values", "many tensors", "65 dimensions"],
)
def test_what_would_be_refused_when_read_is_not_saved(store, step, tensors, state):
    with pytest.raises(CheckpointError):
        store.save(step, {"model": tensors}, state)
    assert names(store) == []


@pytest.mark.parametrize(
    "dtype",
    [torch.int64, torch.uint8, torch.bool, torch.float64, torch.float16, torch.complex64, torch.float8_e4m3fn],
)
def test_every_dtype(store, dtype):
    files = {"model": {"w": torch.ones(3).to(dtype), "empty": torch.empty(0, 2, dtype=dtype)}}
    store.save(1, files, {})
    loaded = store.latest()[0].files()["model"]
    assert loaded["w"].dtype == dtype
    assert loaded["w"].tolist() == [1, 1, 1]


# --- hostile and corrupt folders


@pytest.fixture
def saved(store, tiny):
    return store.save(7, tiny["full"](7), tiny["state"])


def test_latest_returns_the_newest_valid_checkpoint_and_reasons_for_the_others(store, tiny, saved):
    store.save(9, tiny["full"](9), tiny["state"])
    (store.path(9) / "rng-0.safetensors").unlink()
    store.path(11).mkdir()
    store.path(13).write_text("a file")
    store.path(15).symlink_to(saved)
    checkpoint, invalid = store.latest()
    assert checkpoint.step == 7
    assert [step in reason for step, reason in zip(folders(15, 13, 11, 9), invalid, strict=True)] == [True] * 4


def test_a_checkpoint_can_be_opened_anywhere(tmp_path, saved):
    (tmp_path / "link").symlink_to(saved)
    assert open_checkpoint(tmp_path / "link").step == 7
    saved.rename(tmp_path / "favourite")
    assert open_checkpoint(tmp_path / "favourite").step == 7


def test_a_checkpoint_named_after_another_step_is_refused(store, saved):
    saved.rename(store.path(8))
    with pytest.raises(CorruptCheckpoint, match="not a valid checkpoint manifest"):
        open_checkpoint(store.path(8))


def edit(path, change):
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


ENTRY = {"size": 4, "sha256": "0" * 64}
EDITS = {
    "a missing file": lambda m: m["files"].update({"other.safetensors": ENTRY}),
    "a path out of the folder": lambda m: m["files"].update({"../state.safetensors": ENTRY}),
    "an absolute path": lambda m: m["files"].update({"/etc/passwd": ENTRY}),
    "a nested folder": lambda m: m["files"].update({"a/b/model.safetensors": ENTRY}),
    "a file and a folder of one name": lambda m: m["files"].update({"model/a.safetensors": ENTRY}),
    "itself": lambda m: m["files"].update({"manifest.json": ENTRY}),
    "no state": lambda m: m["files"].pop("state.json"),
    "a wrong size": lambda m: m["files"]["model.safetensors"].update(size=5),
    "a huge size": lambda m: m["files"]["state.json"].update(size=1 << 60),
    "an invalid size": lambda m: m["files"]["model.safetensors"].update(size=True),
    "a wrong hash": lambda m: m["files"]["rng-0.safetensors"].update(sha256="0" * 64),
    "another step": lambda m: m.update(step=8),
    "a score": lambda m: m.update(score=1.0),
    "an invalid score": lambda m: m.update(score=float("nan")),
    "no format": lambda m: m.pop("format"),
}


@pytest.mark.parametrize("what", EDITS)
def test_a_wrong_manifest_is_refused(saved, what):
    edit(saved, EDITS[what])
    with pytest.raises(CorruptCheckpoint, match=r"manifest|\.safetensors|state\.json"):
        open_checkpoint(saved)


def test_a_checkpoint_of_another_version_is_refused(saved):
    edit(saved, lambda manifest: manifest.update(format=1))
    with pytest.raises(CorruptCheckpoint, match=r"has format 1.* saved by another version of homebrew"):
        open_checkpoint(saved)


def test_files_outside_the_manifest_are_ignored(saved, tiny):
    os.mkfifo(saved / "evil.safetensors")
    assert equal(open_checkpoint(saved).files(), tiny["full"](7))


def test_a_file_that_changes_after_it_was_verified_is_refused(saved):
    checkpoint = open_checkpoint(saved)
    path = saved / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + b"x")
    with pytest.raises(CorruptCheckpoint, match=r"model\.safetensors is not the file"):
        checkpoint.files()


@pytest.mark.parametrize("kind", ["link", "pipe"])
@pytest.mark.parametrize("name", ["manifest.json", "state.json", "model.safetensors"])
def test_links_and_pipes_are_not_followed(tmp_path, saved, name, kind):
    path = saved / name
    path.rename(tmp_path / name)
    path.symlink_to(tmp_path / name) if kind == "link" else os.mkfifo(path)
    with pytest.raises(CorruptCheckpoint, match=name):
        open_checkpoint(saved)
