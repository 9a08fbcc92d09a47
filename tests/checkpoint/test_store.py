import json
import os
import stat
import warnings

import pytest
import torch

from homebrew.checkpoint.manifest import open_checkpoint
from homebrew.checkpoint.store import CheckpointStore
from homebrew.errors import CheckpointError, ConfigError, CorruptCheckpoint, NonFiniteError


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
def test_what_was_saved_is_loaded(store, tiny, kind):
    path = store.save(7, tiny[kind](7), tiny["state"], score=2)
    checkpoint, passed_over = store.latest()
    assert (checkpoint.path, checkpoint.step, checkpoint.state, passed_over) == (path, 7, tiny["state"], [])
    assert set(checkpoint.names) == set(tiny[kind](7))
    assert equal(checkpoint.files(), tiny[kind](7))


def test_an_empty_store(tmp_path):
    assert CheckpointStore(tmp_path / "never made").latest() == (None, [])
    assert CheckpointStore(tmp_path / "never made").steps() == []


def test_modes_follow_the_umask(store, tiny):
    before = os.umask(0o027)
    try:
        path = store.save(1, tiny["full"](1), tiny["state"])
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o750
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o640}


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written to: File exists"):
        CheckpointStore(tmp_path / "file").prepare()


def test_a_folder_that_goes_missing_is_made_again(store, tiny):
    store.folder.rmdir()
    store.save(1, tiny["full"](1), tiny["state"])
    assert store.steps() == [1]


# --- which are kept


def save_all(store, tiny, scores):
    for step, score in scores.items():
        store.save(step, tiny["adapter"](step), tiny["state"], score=score)


def test_the_last_every_and_the_best_are_kept(tmp_path, tiny):
    store = CheckpointStore(tmp_path, keep_last=2, keep_every=4)
    save_all(store, tiny, {1: 3.0, 2: None, 3: 1.0, 4: 2.0, 5: float("nan"), 6: float("inf"), 7: 1.5})
    assert store.steps() == [3, 4, 6, 7]


def test_what_is_damaged_neither_counts_nor_is_removed(tmp_path, tiny):
    store = CheckpointStore(tmp_path, keep_last=2)
    save_all(store, tiny, {1: None, 2: None})
    (store.path(2) / "adapter.safetensors").write_bytes(b"short")
    save_all(store, tiny, {3: None})
    assert store.steps() == [1, 2, 3]
    save_all(store, tiny, {4: None, 5: None})
    assert store.steps() == [2, 4, 5]


def test_another_processs_checkpoints_are_verified_before_they_count(tmp_path, tiny):
    save_all(CheckpointStore(tmp_path, keep_last=3), tiny, {1: None, 2: None, 3: 0.5})
    for step in (2, 3):
        with (CheckpointStore(tmp_path).path(step) / "adapter.safetensors").open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"x")  # of the right size, and wrong
    store = CheckpointStore(tmp_path, keep_last=2)
    save_all(store, tiny, {4: 0.7})
    assert store.steps() == [1, 2, 3, 4]
    save_all(store, tiny, {5: 0.9, 6: 0.9})
    assert store.steps() == [2, 3, 4, 5, 6]


def test_only_what_a_store_wrote_is_removed(tmp_path, tiny):
    store = CheckpointStore(tmp_path, keep_last=1)
    save_all(store, tiny, {1: None})
    (store.path(1) / "notes.txt").write_text("a person's")
    (tmp_path / "elsewhere").mkdir()
    kept = ["best", "step-1", "step-00000000-copy", ".step-00000003.mine"]
    for name in kept:
        (store.folder / name).mkdir()
    store.path(2).symlink_to(tmp_path / "elsewhere")
    save_all(store, tiny, {3: None, 4: None, 5: None})
    assert names(store) == sorted([*kept, *folders(1, 2, 5)])


def test_going_on_from_an_older_step_keeps_what_it_saves(tmp_path, tiny):
    store = CheckpointStore(tmp_path, keep_last=1)
    save_all(store, tiny, {8: None, 4: None, 6: None})
    assert store.steps() == [6, 8]


def test_what_cannot_be_removed_is_told_and_tried_again(tmp_path, tiny, monkeypatch):
    store = CheckpointStore(tmp_path, keep_last=1)
    save_all(store, tiny, {1: None})
    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", lambda *_, **__: (_ for _ in ()).throw(OSError(39, "Directory not empty")))
        with pytest.warns(UserWarning, match="step-00000001 could not be removed"):
            save_all(store, tiny, {2: None})
    save_all(store, tiny, {3: None})
    assert names(store) == folders(3)


# --- a step saved again


def test_a_step_saved_again_replaces_the_first(store, tiny):
    store.save(4, tiny["full"](4), tiny["state"])
    store.save(4, tiny["full"](5), tiny["state"])
    assert equal(store.latest()[0].files(), tiny["full"](5))
    assert names(store) == folders(4)


def test_what_stands_aside_is_found_and_put_back(store, tiny):
    path = store.save(4, tiny["full"](4), tiny["state"])
    path.rename(store.folder / ".step-00000004.aside")
    assert store.steps() == [4]
    assert equal(store.latest()[0].files(), tiny["full"](4))
    store.save(6, tiny["full"](6), tiny["state"])
    assert names(store) == folders(4, 6)


# --- what a save refuses


def test_numbers_that_are_not_finite_are_not_saved(store, tiny):
    store.save(1, tiny["full"](1), tiny["state"])
    files = tiny["full"](2)
    files["model"]["b"][3] = float("inf")
    with pytest.raises(NonFiniteError, match="step 2 was not saved: b in model"):
        store.save(2, files, tiny["state"])
    assert names(store) == folders(1)


@pytest.mark.parametrize(
    ("step", "name", "state"),
    [(10**8, "model", {}), (-1, "model", {}), (1, "Model", {}), (1, "model", {"text": "x" * (17 << 20)})],
)
def test_what_could_not_be_read_again_is_not_saved(store, step, name, state):
    with pytest.raises(CheckpointError):
        store.save(step, {name: {"w": torch.zeros(1)}}, state)
    assert names(store) == []


@pytest.mark.parametrize(
    "dtype",
    [torch.int64, torch.uint8, torch.bool, torch.float64, torch.float16, torch.complex64, torch.float8_e4m3fn],
)
def test_every_kind_of_number(store, dtype):
    files = {"model": {"w": torch.ones(3).to(dtype), "empty": torch.empty(0, 2, dtype=dtype)}}
    store.save(1, files, {})
    loaded = store.latest()[0].files()["model"]
    assert loaded["w"].dtype == dtype
    assert loaded["w"].tolist() == [1, 1, 1]


# --- by several processes


@pytest.mark.parametrize("error", [None, CheckpointError("Process 1 could not write its part")])
def test_a_part_that_fails_waits_for_the_others_before_the_folder_is_cleared(store, tiny, error):
    found = []

    def others():
        found.extend(names(store))
        if error is not None:
            raise error
        return {}

    store.start(1)
    files = tiny["full"](1) | {"model": {"w": torch.tensor(float("nan"))}}
    with pytest.raises(NonFiniteError, match="step 1 was not saved"):
        store.save(1, files, tiny["state"], others=others)
    assert found == [".step-00000001.writing"]
    assert names(store) == []


# --- folders from strangers


@pytest.fixture
def saved(store, tiny):
    return store.save(7, tiny["full"](7), tiny["state"])


def test_the_newest_whole_one_is_taken_and_the_others_told(store, tiny, saved):
    store.save(9, tiny["full"](9), tiny["state"])
    (store.path(9) / "rng-0.safetensors").unlink()
    store.path(11).mkdir()
    store.path(13).write_text("a file")
    store.path(15).symlink_to(saved)
    checkpoint, passed_over = store.latest()
    assert checkpoint.step == 7
    assert [step in reason for step, reason in zip(folders(15, 13, 11, 9), passed_over, strict=True)] == [True] * 4


def test_a_named_checkpoint_may_be_anywhere(tmp_path, saved):
    (tmp_path / "link").symlink_to(saved)
    assert open_checkpoint(tmp_path / "link").step == 7
    saved.rename(tmp_path / "favourite")
    assert open_checkpoint(tmp_path / "favourite").step == 7


def test_a_checkpoint_under_another_steps_name(store, saved):
    saved.rename(store.path(8))
    with pytest.raises(CorruptCheckpoint, match="not a checkpoint's manifest"):
        store.open(store.path(8))


def edit(path, change):
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


ENTRY = {"size": 4, "sha256": "0" * 64}
EDITS = {
    "a file that is not there": lambda m: m["files"].update({"other.safetensors": ENTRY}),
    "out of the folder": lambda m: m["files"].update({"../state.safetensors": ENTRY}),
    "an absolute path": lambda m: m["files"].update({"/etc/passwd": ENTRY}),
    "itself": lambda m: m["files"].update({"manifest.json": ENTRY}),
    "no state": lambda m: m["files"].pop("state.json"),
    "a size that is wrong": lambda m: m["files"]["model.safetensors"].update(size=5),
    "a size that is huge": lambda m: m["files"]["state.json"].update(size=1 << 60),
    "a size that is none": lambda m: m["files"]["model.safetensors"].update(size=True),
    "a hash that is wrong": lambda m: m["files"]["rng-0.safetensors"].update(sha256="0" * 64),
    "another step": lambda m: m.update(step=8),
    "a score": lambda m: m.update(score=1.0),
    "a score that is none": lambda m: m.update(score=float("nan")),
    "another format": lambda m: m.update(format=2),
}


@pytest.mark.parametrize("what", EDITS)
def test_a_manifest_that_lies(saved, what):
    edit(saved, EDITS[what])
    with pytest.raises(CorruptCheckpoint, match=r"manifest|\.safetensors|state\.json"):
        open_checkpoint(saved)


def test_files_the_manifest_does_not_name_are_not_read(saved, tiny):
    os.mkfifo(saved / "evil.safetensors")
    assert equal(open_checkpoint(saved).files(), tiny["full"](7))


def test_a_file_that_changes_after_it_was_verified(saved):
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


@pytest.mark.parametrize("header", [b"\xff" * 8, (17 << 20).to_bytes(8, "little"), b"\x10" + b"\0" * 7 + b"{" * 16])
def test_hostile_headers(store, tiny, header, monkeypatch):
    monkeypatch.setattr("homebrew.checkpoint.checkpoint_files.serialised", lambda tensors: [header])
    path = store.save(1, tiny["full"](1), tiny["state"])
    with pytest.raises(CorruptCheckpoint, match="is not a safetensors file"):
        open_checkpoint(path).files()


def test_no_pickle_is_opened(store, tiny, monkeypatch):
    import pickle
    import sys

    store.save(1, tiny["full"](1), tiny["state"])
    pickled = pickle.dumps({"w": [os.getpid]})
    with monkeypatch.context() as patch:
        patch.setattr("homebrew.checkpoint.checkpoint_files.serialised", lambda tensors: [pickled])
        store.save(2, tiny["full"](2), tiny["state"])
    store.path(3).mkdir()
    (store.path(3) / "manifest.json").write_bytes(pickled)
    child = os.fork()
    if child == 0:  # an audit hook is for a process's life
        code = 1
        try:
            seen = []
            sys.addaudithook(lambda event, args: seen.append(event) if event.startswith(("pickle", "exec")) else None)
            for step in (1, 2, 3):
                try:
                    store.open(store.path(step)).files()
                except CorruptCheckpoint:
                    seen.append(f"refused {step}")
            clean = seen == ["refused 2", "refused 3"]
            pickle.loads(pickled)  # the hook does hear
            code = 0 if clean and seen[2:] == ["pickle.find_class"] else 1
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_saving_warns_of_nothing(store, tiny):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(4):
            store.save(step, tiny["full"](step), tiny["state"])
