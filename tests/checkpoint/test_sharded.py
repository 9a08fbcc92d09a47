"""Folders of shards: saved by PyTorch, and refused if they do not hold full tensors."""

import json
import math
import os
import resource
from contextlib import nullcontext

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from shards import write_shard

from homebrew.checkpoint.manifest import open_checkpoint
from homebrew.checkpoint.sharded_load import load_shards
from homebrew.checkpoint.sharded_save import check_shared_folder, save_sharded, save_shards
from homebrew.checkpoint.verified_files import measure
from homebrew.errors import CheckpointError, ConfigError, CorruptCheckpoint, NonFiniteError

FULL = {"w": torch.arange(20.0).view(5, 4), "b": torch.arange(3, dtype=torch.bfloat16), "step": torch.tensor(7.0)}


def split():
    """Return the shards of two ranks."""
    return [
        {"w": ([0, 0], FULL["w"][:3].clone()), "b": ([0], FULL["b"]), "step": ([], FULL["step"])},
        {"w": ([3, 0], FULL["w"][3:].clone())},
    ]


def write(folder, ranks):
    folder.mkdir()
    files = [f"shard-0000{rank}-model-00001-of-00001.safetensors" for rank in range(1, len(ranks) + 1)]
    for file, shards in zip(files, ranks, strict=True):
        write_shard(folder / file, shards)
    return files


def commit(store, ranks):
    """Save a checkpoint whose model is sharded."""
    store.begin(1)
    folder = store.temporary_path(1)
    files = write(folder / "model", ranks)
    shards = {f"model/{file}": measure(folder / "model" / file) for file in files}
    return store.commit(1, {"optimizer": {"step": torch.tensor(1.0)}}, {}, shards=shards)


def equal(a, b):
    return a.keys() == b.keys() and all(a[name].equal(b[name]) and a[name].dtype == b[name].dtype for name in a)


@pytest.fixture
def process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_pytorch_writes_what_is_read(tmp_path):
    save_shards(tmp_path / "model", FULL)
    [path] = (tmp_path / "model").iterdir()
    assert path.name == "shard-00001-model-00001-of-00001.safetensors"
    assert equal(load_shards(tmp_path / "model", {path.name}, max_bytes=path.stat().st_size), FULL)


@pytest.mark.usefixtures("process_group")
def test_a_failed_write_is_a_checkpoint_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"could not be written by rank 0: .*Not a directory"):
        save_shards(tmp_path / "file" / "model", FULL)


SMALL = {"guard": {"history": torch.zeros(3)}}


@pytest.mark.usefixtures("process_group")
def test_all_ranks_save_a_checkpoint(store):
    store.save(1, SMALL, {})
    save_sharded(Accelerator(cpu=True), store, 2, {"model": FULL}, SMALL, {"a": 1}, score=0.5)
    checkpoint, invalid = store.latest()
    assert invalid == []
    assert (checkpoint.step, checkpoint.state, checkpoint.manifest.score) == (2, {"a": 1}, 0.5)
    assert equal(checkpoint.files()["model"], FULL)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("step", [1, 2])
def test_a_failed_save_leaves_earlier_checkpoints(store, monkeypatch, step):
    store.save(1, SMALL, {"a": 1})
    bad = SMALL | {"guard": {"history": torch.full((3,), float("inf"))}}
    with pytest.raises(NonFiniteError, match="history in guard"):
        save_sharded(Accelerator(cpu=True), store, step, {"model": FULL}, bad, {}, score=None)
    bad = {"w": torch.full((2,), float("nan"))}
    with pytest.raises(NonFiniteError, match="w in model"):
        save_sharded(Accelerator(cpu=True), store, step, {"model": bad}, SMALL, {}, score=None)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"could not be written by rank 0: .*File too large"):
            save_sharded(Accelerator(cpu=True), store, step, {"model": FULL}, SMALL, {}, score=None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in store.folder.iterdir()] == ["step-00000001"]
    assert store.latest()[0].state == {"a": 1}


def answer_of_rank_1(monkeypatch, **result):
    """Make every collective return this result for rank 1."""
    answers = lambda _accelerator, data: [data, json.dumps(result).encode()]  # noqa: E731
    monkeypatch.setattr("homebrew.distributed.collectives.gather_bytes", answers)


def test_an_error_of_another_rank_is_raised(store, monkeypatch):
    answer_of_rank_1(monkeypatch, error="NonFiniteError", message="w in model is not finite.")
    with pytest.raises(NonFiniteError, match="Rank 1: w in model"):
        save_sharded(Accelerator(cpu=True), store, 1, {"model": FULL}, SMALL, {}, score=None)
    assert store.steps() == []


@pytest.mark.parametrize("is_visible", [True, False])
def test_a_folder_that_is_not_shared_is_a_config_error(store, monkeypatch, is_visible):
    answer_of_rank_1(monkeypatch, result=[is_visible, "node-1"])
    with nullcontext() if is_visible else pytest.raises(ConfigError, match=r"rank 1 on node-1.* gather_limit_bytes"):
        check_shared_folder(Accelerator(cpu=True), store, 1)
    assert list(store.folder.iterdir()) == []


def test_shards_are_one_entry_of_a_checkpoint(store):
    path = commit(store, split())
    assert [file.name for file in path.iterdir() if file.is_dir()] == ["model"]
    checkpoint, invalid = store.latest()
    assert invalid == []
    assert sorted(checkpoint.names) == ["model", "optimizer"]
    assert equal(checkpoint.files()["model"], FULL)


@pytest.mark.parametrize("change", ["missing", "truncated"])
def test_shards_that_rank_0_cannot_see_are_not_committed(store, change):
    store.begin(1)
    folder = store.temporary_path(1) / "model"
    files = [folder / name for name in write(folder, split())]
    shards = {f"model/{path.name}": measure(path) for path in files}
    files[1].unlink() if change == "missing" else files[1].write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"{files[1].name}.*the ranks do not share the folder"):
        store.commit(1, SMALL, {}, shards=shards)
    assert store.steps() == []


def test_sharded_checkpoints_are_pruned(store):
    for _ in range(3):
        commit(store, split())
    for step in (2, 3):
        store.save(step, {"optimizer": {}}, {})
    assert store.steps() == [2, 3]


INVALID = {
    "an overlap": lambda first, second: second.update(w=([2, 0], FULL["w"][2:4].clone())),
    "a gap": lambda first, second: second.update(w=([4, 0], FULL["w"][4:].clone())),
    "a repeated shard": lambda first, second: second.update(step=([], FULL["step"])),
    "a missing first shard": lambda first, second: first.pop("w"),
    "a narrower shard": lambda first, second: second.update(w=([3, 0], torch.zeros(2, 3))),
    "other dimensions": lambda first, second: second.update(w=([3], torch.zeros(2))),
    "a negative offset": lambda first, second: second.update(w=([-2, 0], torch.zeros(2, 4))),
    "a huge offset": lambda first, second: second.update(w=([1 << 60, 0], torch.zeros(2, 4))),
    "offsets beyond int64": lambda first, second: second.update(w=([1 << 70, 0], torch.zeros(2, 4))),
    "an offset that is not a number": lambda first, second: second.update(w=(["x", 0], torch.zeros(2, 4))),
    "a value that is not finite": lambda first, second: second["w"][1].fill_(float("nan")),
}


@pytest.mark.parametrize("case", INVALID)
def test_invalid_shards_are_refused(store, bounded_memory, case):
    ranks = split()
    INVALID[case](*ranks)
    path = commit(store, ranks)
    with pytest.raises(CorruptCheckpoint, match="model"), bounded_memory():
        open_checkpoint(path).tensors("model")


def test_a_negative_size_does_not_hide_a_huge_one(tmp_path):
    shards = {"huge": ([1 << 40], torch.zeros(1)), "negative": ([-1 << 40], torch.zeros(1))}
    write_shard(tmp_path / "a.safetensors", shards)
    with pytest.raises(CorruptCheckpoint, match="a shard has a negative offset or size"):
        load_shards(tmp_path, {"a.safetensors"}, max_bytes=1000)


@pytest.mark.parametrize("metadata", ["[", "[]", "{}", '{"w": {}}', '{"w": 3}', "[" * 100_000])
def test_invalid_metadata_is_refused(tmp_path, metadata):
    save_file({"w": torch.zeros(2)}, tmp_path / "a.safetensors", metadata={"DCP_SHARDING_INFO": metadata})
    with pytest.raises(CorruptCheckpoint, match="does not hold valid shards"):
        load_shards(tmp_path, {"a.safetensors"}, max_bytes=1000)


@pytest.mark.parametrize("change", ["missing", "swapped", "truncated", "changed"])
def test_changed_files_are_refused(store, change):
    path = commit(store, split())
    checkpoint = open_checkpoint(path)
    first, second = sorted((path / "model").iterdir())
    if change == "missing":
        second.unlink()
    elif change == "swapped":
        first.rename(path / "swap"), second.rename(first), (path / "swap").rename(second)
    else:
        data = second.read_bytes()
        second.write_bytes(data[:-1] + (b"" if change == "truncated" else bytes([data[-1] ^ 1])))
    for load in (lambda: open_checkpoint(path), checkpoint.files):  # also if it changes after it was opened
        with pytest.raises(CorruptCheckpoint, match=r"shard-0000[12]-model-00001-of-00001\.safetensors"):
            load()


@pytest.mark.parametrize("kind", ["file", "pipe", "link"])
def test_files_outside_the_manifest_are_not_read(tmp_path, store, kind):
    path = commit(store, split())
    if kind == "file":
        write_shard(path / "model" / "extra.safetensors", {"w": ([0, 0], torch.zeros(5, 4))})
    elif kind == "pipe":
        os.mkfifo(path / "model" / "extra.safetensors")
    else:
        (path / "model").rename(tmp_path / "elsewhere")
        (path / "model").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CorruptCheckpoint, match="is a link, or holds safetensors files that are not in the manifest"):
        open_checkpoint(path).files()


def test_other_files_beside_shards_are_ignored(store):
    path = commit(store, split())
    (path / "model" / ".nfs0001").touch()  # an NFS client's name for a file that was removed while it was open
    assert equal(open_checkpoint(path).files()["model"], FULL)


OFFSETS = st.lists(st.integers(-3, 8) | st.sampled_from([1 << 40, (1 << 63) - 1, -(1 << 63)]), max_size=3)


@settings(max_examples=100)
@given(shards=st.lists(st.tuples(OFFSETS, st.integers(0, 4), st.sampled_from([(2,), (), (0,), (0, 1 << 40)]))))
def test_any_shards_are_loaded_completely_or_refused(tmp_path_factory, shards):
    folder = tmp_path_factory.mktemp("shards")
    for i, (offsets, num_rows, shape) in enumerate(shards):
        metadata = {"DCP_SHARDING_INFO": json.dumps({"w": {"saved_offsets": offsets}})}
        save_file({"w": torch.ones(num_rows, *shape)}, folder / f"{i}.safetensors", metadata=metadata)
    try:
        tensors = load_shards(folder, {f"{i}.safetensors" for i in range(len(shards))}, max_bytes=1000)
    except CorruptCheckpoint:
        return
    assert all(tensor.eq(1).all() for tensor in tensors.values())
    assert sum(t.numel() for t in tensors.values()) == sum(num_rows * math.prod(s) for _, num_rows, s in shards)
