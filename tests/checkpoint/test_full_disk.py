"""Saves on full disks, real ones."""

import ctypes
import json
import os
import resource
import traceback
import warnings
from pathlib import Path

import pytest
import torch

from homebrew.checkpoint.store import CheckpointStore
from homebrew.errors import CheckpointError
from homebrew.metrics.metrics_log import MetricsLog

PAGE = os.sysconf("SC_PAGE_SIZE")
FAILED, MOUNTS_NOTHING = 1, 77


def big_files(step):
    """Files of some pages each."""
    return {name: {"w": torch.full((2 * PAGE // 4 + 100,), float(step))} for name in ("model", "optimizer")}


def check_failure(store, before):
    """A save fails, says where and for how many bytes, and leaves everything as it was."""
    with pytest.raises(CheckpointError, match=r"step-00000002.* \([\d,]+ bytes\) could not be written: .*Free") as told:
        store.save(2, big_files(2), {"text": "x" * 5000})
    assert {path.name for path in store.folder.iterdir()} == {"step-00000001"}
    assert store.latest()[0].files()["model"]["w"].tolist() == before
    return str(told.value)


def test_a_limit_on_file_size_at_every_size(store):
    store.save(1, big_files(1), {})
    before = big_files(1)["model"]["w"].tolist()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    largest = max(path.stat().st_size for path in store.path(1).iterdir())
    for limit in [0, 1, 7, *range(100, largest, 64), largest - 1]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            check_failure(store, before)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    store.save(2, big_files(2), {})
    assert store.latest()[0].step == 2


def test_figures_that_do_not_fit_are_told_of_and_the_run_goes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.write("step", step=1)
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (0, 10):  # nothing of the line fits, or a part
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + room, usual[1]))
        try:
            with pytest.warns(UserWarning, match=r"metrics\.jsonl could not be written: .* Free some space"):
                log.write("step", step=2)
            log.write("step", step=3)  # told once, until there is space again
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, usual)
        log.write("step", step=4)
    log.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 4, 4]


def mount_small_disk(folder, size):
    """A file system of a few bytes, seen by this process alone."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(0x10020000):  # CLONE_NEWUSER | CLONE_NEWNS
        raise OSError(ctypes.get_errno(), "unshare")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    if libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, f"size={size}".encode()):
        raise OSError(ctypes.get_errno(), "mount")


def fill_at_every_size(folder):
    store = CheckpointStore(folder, keep_last=2)
    store.prepare()
    store.save(1, big_files(1), {})
    before, ballast, told = big_files(1)["model"]["w"].tolist(), folder / "ballast", []
    for free_pages in range(9):  # the save needs one more
        with ballast.open("wb") as file:
            file.write(bytes((os.statvfs(folder).f_bavail - free_pages) * PAGE))
        told.append(check_failure(store, before))
        ballast.unlink()
    for step in (2, 3, 4):
        store.save(step, big_files(step), {})
    assert store.steps() == [3, 4]
    for file in ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"):
        assert any(file in message for message in told), told


def test_a_small_disk_full_at_every_size(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside torch's idle threads
        child = os.fork()
    if child == 0:
        try:
            code = MOUNTS_NOTHING
            mount_small_disk(tmp_path, 60 * PAGE)
            code = FAILED
            fill_at_every_size(tmp_path)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == MOUNTS_NOTHING:
        pytest.skip("this system lets its users mount nothing")
    assert code == 0
    assert not list(tmp_path.iterdir())  # it was another disk
