"""A save killed, or out of power, at any moment."""

import contextlib
import itertools
import os
import shutil
import signal
import tempfile
import warnings
from functools import partial
from pathlib import Path

import pytest

from homebrew.checkpoint.checkpoint_files import write_files
from homebrew.checkpoint.store import CheckpointStore

OPERATIONS = ("mkdir", "open", "write", "fsync", "close", "rename", "unlink", "rmdir")


@contextlib.contextmanager
def watched(tell):
    """Call `tell(name, args, result)` before (result None) and after every file-system operation."""
    original = {name: getattr(os, name) for name in OPERATIONS}
    telling = False

    def tell_alone(*event):
        nonlocal telling
        telling = True  # what it does itself is not told of
        tell(*event)
        telling = False

    def watch(name):
        def call(*args, **kwargs):
            if telling:
                return original[name](*args, **kwargs)
            tell_alone(name, args, None)
            result = original[name](*args, **kwargs)
            tell_alone(name, args, (result,))
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
    """Do it in a child that kills itself at a moment; whether it came to that."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside torch's idle threads
        child = os.fork()
    if child == 0:
        moments = itertools.count()

        def tell(*_):
            if next(moments) == moment:
                os.kill(os.getpid(), signal.SIGKILL)

        code = 1
        try:
            with watched(tell):
                work()
            code = 0
        finally:
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


class Scene:
    """A run with checkpoints of two steps, about to save the next, or its last once more."""

    def __init__(self, folder, tiny, kind, keep_last, again):
        self.folder, self.tiny, self.kind, self.keep_last = folder, tiny, kind, keep_last
        self.next = 4 if again else 6
        store = self.store(folder / "before")
        for step in (2, 4):
            self.save(store, step, step)
        self.allowed = [(4, 4), (4, 5)] if again else [(4, 4), (6, 5)]
        """Steps, and what their numbers tell, of which one must be there."""

    def store(self, folder):
        store = CheckpointStore(folder, keep_last=self.keep_last)
        store.prepare()
        return store

    def save(self, store, step, told):
        files, others = self.tiny[self.kind](told), None
        if self.kind == "pieces":
            name, theirs = files.popitem()
            store.start(step)
            others = partial(write_files, store.temporary(step), step, {name: theirs})
        store.save(step, files, self.tiny["state"], others=others)

    def work(self, store):
        self.save(store, self.next, 5)

    def check(self, folder):
        """The newest whole checkpoint is N - 1 or N, and the run goes on from it."""
        store = self.store(folder)
        checkpoint, _ = store.latest()
        told = checkpoint.files()["optimizer"]["w//step"].item()
        assert (checkpoint.step, told) in self.allowed
        self.save(store, 8, 8)
        names = sorted(path.name for path in store.folder.iterdir())
        assert names == [f"step-{step:08}" for step in store.steps()]
        assert len(names) == self.keep_last
        assert store.latest()[0].step == 8
        return told


SCENES = [*itertools.product(["full", "adapter"], [1, 2], [False, True]), ("pieces", 1, False), ("pieces", 1, True)]


@pytest.fixture(params=SCENES, ids=lambda scene: f"{scene[0]}-{scene[1]}-{'again' if scene[2] else 'next'}")
def scene(request, tiny):
    memory = Path("/dev/shm")  # a kill is the same on every file system, and this one waits for no disk
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Scene(Path(folder), tiny, *request.param)


@pytest.mark.slow
def test_killed_before_and_after_every_operation(scene):
    told = []
    for moment in itertools.count():
        folder = scene.folder / f"killed-{moment}"
        shutil.copytree(scene.folder / "before", folder)
        store = scene.store(folder)
        killed = killed_at(moment, lambda store=store: scene.work(store))
        told.append(scene.check(folder))
        shutil.rmtree(folder)
        if not killed:
            break
    assert len(told) > 60  # in each of the scenes
    assert told == sorted(told)  # once the new one is there, it stays
    assert set(told) == {4, 5}


# --- the order of operations, and power that fails


def trace(work):
    """Every operation's name and path, in order."""
    done, paths = [], {}

    def tell(name, args, result):
        if name == "open" and result:
            paths[result[0]] = Path(args[0])
        elif result is None and name != "open":
            path = paths[args[0]] if isinstance(args[0], int) else Path(args[0])
            done.append((name, path.name))

    with watched(tell):
        work()
    return done


def test_the_order_of_a_save(scene):
    store = scene.store(scene.folder / "before")
    done = trace(lambda: scene.work(store))
    name = f"step-{scene.next:08}"
    temporary = f".{name}.writing"
    files = [*(f"{file}.safetensors" for file in scene.tiny[scene.kind](0)), "state.json", "manifest.json"]
    where = {  # the last write of each
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
    for at, (kind, moved) in enumerate(done):  # a checkpoint's files go once it no longer has its name
        if kind == "rename" and moved != temporary and where["removed"] and at > where["parent"]:
            assert done[at + 1] == ("fsync", "checkpoints")
    aside = [at for at, operation in enumerate(done) if operation == ("rename", name)]
    assert aside == ([where["renamed"] - 1] if scene.next == 4 else [])


class Disk:
    """What a power failure leaves: of files what was synced, of folders the entries that were."""

    def __init__(self, root):
        self.root, self.numbers, self.fresh = root, {}, itertools.count()
        self.files, self.folders = {}, {}
        for path in (root, *root.rglob("*")):
            self.sync(path)

    def number(self, path):
        """A file's own number; the kernel's is used again when it is gone."""
        return self.numbers.setdefault(path.lstat().st_ino, next(self.fresh))

    def sync(self, path):
        if path.is_dir():
            self.folders[self.number(path)] = {child.name: self.number(child) for child in path.iterdir()}
        else:
            self.files[self.number(path)] = path.read_bytes()

    def tell(self, name, args, result):
        if result is None:
            return
        if name == "mkdir" or (name == "open" and args[1] & os.O_CREAT):
            self.numbers[Path(args[0]).stat().st_ino] = next(self.fresh)
        if name == "fsync":
            self.sync(Path(f"/proc/self/fd/{args[0]}").readlink())

    def lay_out(self, target, number, gone=()):
        """Only what was synced: nothing else had reached the disk, but that the files `gone` were removed."""
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
        """What was synced, but that every removal of a file since has reached the disk before any renaming."""
        present = {self.number(path) for path in (self.root, *self.root.rglob("*"))}
        self.lay_out(target, self.number(self.root), self.files.keys() - present)

    def lay_out_zeroed(self, target):
        """All names as they are, and zeros in what was not synced."""
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
    kinds, left = ("synced", "removed", "zeroed"), []

    def tell(name, args, result):
        disk.tell(name, args, result)
        if result is not None:
            number = len(left)
            left.extend(scene.folder / f"{kind}-{number}" for kind in kinds)
            disk.lay_out(left[-3], disk.number(before))
            disk.lay_out_removed(left[-2])
            disk.lay_out_zeroed(left[-1])

    with watched(tell):
        scene.work(store)
    told = {kind: [scene.check(folder) for folder in left if kind in folder.name] for kind in kinds}
    assert all(len(steps) > 30 and set(steps) == {4, 5} for steps in told.values())
