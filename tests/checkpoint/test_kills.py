"""Saves interrupted at any moment, by SIGKILL or by a power failure."""

import contextlib
import itertools
import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
from child_processes import exit_code, fork
from platforms import needs_linux
from safetensors.torch import save
from shards import sharding_info

from homebrew.checkpoint.store import CheckpointStore
from homebrew.checkpoint.verified_files import measure
from homebrew.io import write_durably

pytestmark = needs_linux

OPERATIONS = ("mkdir", "open", "write", "fsync", "close", "rename", "unlink", "rmdir")


@contextlib.contextmanager
def watched(on_event):
    """Call `on_event(name, args, result)` before (result None) and after every file-system operation."""
    original = {name: getattr(os, name) for name in OPERATIONS}
    in_callback = False

    def call_back(*event):
        nonlocal in_callback
        in_callback = True  # operations of the callback are not events
        on_event(*event)
        in_callback = False

    def watch(name):
        def call(*args, **kwargs):
            if in_callback:
                return original[name](*args, **kwargs)
            call_back(name, args, None)
            result = original[name](*args, **kwargs)
            call_back(name, args, (result,))
            return result

        return call

    for name in OPERATIONS:
        setattr(os, name, watch(name))
    try:
        yield
    finally:
        for name, function in original.items():
            setattr(os, name, function)


def killed_at(moment, work):
    """Call `work` in a child that kills itself at the given event; return whether it was killed."""
    counter = itertools.count()

    def on_event(*_):
        if next(counter) == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def watched_work():
        with watched(on_event):
            work()

    code = exit_code(fork(watched_work))
    assert code in (0, -signal.SIGKILL)
    return code != 0


class Scene:
    """A run with checkpoints of steps 2 and 4 that is about to save step 6, or step 4 again.

    Args:
        folder: Folder for the run and its copies.
        tiny: The fixture.
        kind: "full", "adapter", or "sharded" for a checkpoint whose model is in two shards.
        keep_last: Number of checkpoints to keep.
        again: Whether to save step 4 again.
    """

    def __init__(self, folder, tiny, kind, keep_last, again):
        self.folder, self.tiny, self.kind, self.keep_last = folder, tiny, kind, keep_last
        self.next = 4 if again else 6
        store = self.store(folder / "before")
        for step in (2, 4):
            self.save(store, step, step)
        self.allowed = [(4, 4), (4, 5)] if again else [(4, 4), (6, 5)]  # (step, value in its tensors)

    def store(self, folder):
        store = CheckpointStore(folder, keep_last=self.keep_last)
        store.prepare()
        return store

    def save(self, store, step, value):
        if self.kind != "sharded":
            store.save(step, self.tiny[self.kind](value), self.tiny["state"])
            return
        files = self.tiny["full"](value)
        weights, folder, shards = files.pop("model"), store.temporary_path(step), {}
        store.begin(step)
        (folder / "model").mkdir()
        for name, tensor in weights.items():  # the same files and order of operations as torch.distributed.checkpoint
            path = folder / "model" / f"shard-{name}.safetensors"
            write_durably(path, save({name: tensor}, metadata=sharding_info({name: [0] * tensor.dim()})))
            shards[f"model/{path.name}"] = measure(path)
        store.commit(step, files, self.tiny["state"], shards=shards)

    def work(self, store):
        self.save(store, self.next, 5)

    def check(self, folder):
        """Check that the newest valid checkpoint is the old or the new one, and that the run can save the next."""
        store = self.store(folder)
        checkpoint, _ = store.latest()
        value = checkpoint.files()["optimizer"]["w//step"].item()
        assert (checkpoint.step, value) in self.allowed
        self.save(store, 8, 8)
        names = sorted(path.name for path in store.folder.iterdir())
        assert names == [f"step-{step:08}" for step in store.steps()]
        assert len(names) == self.keep_last
        assert store.latest()[0].step == 8
        return value


SCENES = [*itertools.product(["full", "adapter"], [1, 2], [False, True]), ("sharded", 1, False), ("sharded", 1, True)]


@pytest.fixture(params=SCENES, ids=lambda scene: f"{scene[0]}-{scene[1]}-{'again' if scene[2] else 'next'}")
def scene(request, tiny):
    memory = Path("/dev/shm")  # the result does not depend on the file system, and this one is fast
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Scene(Path(folder), tiny, *request.param)


@pytest.mark.slow
def test_killed_before_and_after_every_operation(scene):
    values = []
    for moment in itertools.count():
        folder = scene.folder / f"killed-{moment}"
        shutil.copytree(scene.folder / "before", folder)
        store = scene.store(folder)
        killed = killed_at(moment, lambda store=store: scene.work(store))
        values.append(scene.check(folder))
        shutil.rmtree(folder)
        if not killed:
            break
    assert len(values) > 60  # in each of the scenes
    assert values == sorted(values)  # once the new checkpoint exists, it stays
    assert set(values) == {4, 5}


# --- order of operations, and power failures


def trace(work):
    """Return the name and path of every operation, in order."""
    done, paths = [], {}

    def on_event(name, args, result):
        if name == "open" and result:
            paths[result[0]] = Path(args[0])
        elif result is None and name != "open":
            path = paths[args[0]] if isinstance(args[0], int) else Path(args[0])
            done.append((name, path.name))

    with watched(on_event):
        work()
    return done


def test_the_order_of_a_save(scene):
    store = scene.store(scene.folder / "before")
    done = trace(lambda: scene.work(store))
    name = f"step-{scene.next:08}"
    temporary = f".{name}.writing"
    if scene.kind == "sharded":
        tensors = ["shard-w", "shard-b", "optimizer", "rng-0"]
        assert done.index(("fsync", "model")) < done.index(("rename", temporary))
    else:
        tensors = scene.tiny[scene.kind](0)
    files = [*(f"{file}.safetensors" for file in tensors), "state.json", "manifest.json"]
    where = {  # of writes, the last of each file
        "made": done.index(("mkdir", temporary)),
        "written": [max(at for at, what in enumerate(done) if what == ("write", file)) for file in files],
        "synced": [done.index(("fsync", file)) for file in files],
        "entries": done.index(("fsync", temporary)),
        "renamed": done.index(("rename", temporary)),
        "parent": done.index(("fsync", "checkpoints")),
        "removed": [at for at, (kind, _) in enumerate(done) if kind in ("unlink", "rmdir")],
    }
    order = [where["made"], *itertools.chain(*zip(where["written"], where["synced"], strict=True))]
    order += [where["entries"], where["renamed"], where["parent"], *where["removed"]]
    assert order == sorted(order)
    assert where["removed"] or not (scene.keep_last == 1 or scene.next == 4)
    for at, (kind, moved) in enumerate(done):  # files are removed once the folder has lost its name
        if kind == "rename" and moved != temporary and where["removed"] and at > where["parent"]:
            assert done[at + 1] == ("fsync", "checkpoints")
    aside = [at for at, operation in enumerate(done) if operation == ("rename", name)]
    assert aside == ([where["renamed"] - 1] if scene.next == 4 else [])


class Disk:
    """Simulates what a power failure leaves: synced file contents and synced directory entries."""

    def __init__(self, root):
        self.root, self.numbers, self.fresh = root, {}, itertools.count()
        self.files, self.folders = {}, {}
        for path in (root, *root.rglob("*")):
            self.sync(path)

    def number(self, path):
        """Return a unique number for a file; the kernel reuses inode numbers."""
        return self.numbers.setdefault(path.lstat().st_ino, next(self.fresh))

    def sync(self, path):
        if path.is_dir():
            self.folders[self.number(path)] = {child.name: self.number(child) for child in path.iterdir()}
        else:
            self.files[self.number(path)] = path.read_bytes()

    def on_event(self, name, args, result):
        if result is None:
            return
        if name == "mkdir" or (name == "open" and args[1] & os.O_CREAT):
            self.numbers[Path(args[0]).stat().st_ino] = next(self.fresh)
        if name == "fsync":
            self.sync(Path(f"/proc/self/fd/{args[0]}").readlink())

    def lay_out(self, target, number, gone=()):
        """Write only what was synced, without the files `gone`."""
        if number in gone:
            return
        if number in self.files:
            target.write_bytes(self.files[number])
        elif number in self.folders:
            target.mkdir()
            for name, child in self.folders[number].items():
                self.lay_out(target / name, child, gone)
        else:
            target.touch()

    def lay_out_removed(self, target):
        """Write what was synced, as if all removals of files had reached the disk before any rename."""
        present = {self.number(path) for path in (self.root, *self.root.rglob("*"))}
        self.lay_out(target, self.number(self.root), self.files.keys() - present)

    def lay_out_zeroed(self, target):
        """Write all files under their current names, with zeros in those that were not synced."""
        shutil.copytree(self.root, target)
        for path in self.root.rglob("*"):
            if path.is_file() and self.number(path) not in self.files:
                copy = target / path.relative_to(self.root)
                copy.write_bytes(bytes(copy.stat().st_size))


@pytest.mark.slow
def test_power_lost_after_every_operation(scene):
    before = scene.folder / "before"
    store = scene.store(before)
    disk = Disk(before)
    kinds, folders = ("synced", "removed", "zeroed"), []

    def on_event(name, args, result):
        disk.on_event(name, args, result)
        if result is not None:
            number = len(folders)
            folders.extend(scene.folder / f"{kind}-{number}" for kind in kinds)
            disk.lay_out(folders[-3], disk.number(before))
            disk.lay_out_removed(folders[-2])
            disk.lay_out_zeroed(folders[-1])

    with watched(on_event):
        scene.work(store)
    values = {kind: [scene.check(folder) for folder in folders if kind in folder.name] for kind in kinds}
    assert all(len(steps) > 30 and set(steps) == {4, 5} for steps in values.values())
