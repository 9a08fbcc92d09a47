"""Saves on full disks: a limit on file size, and a small file system."""

import ctypes
import json
import os
import resource
import sys
from pathlib import Path

import pytest
import torch
from child_processes import exit_code, fork
from platforms import needs_linux

from homebrew.checkpoint.store import CheckpointStore
from homebrew.errors import CheckpointError
from homebrew.metrics.metrics_log import MetricsLog

PAGE = os.sysconf("SC_PAGE_SIZE")
CANNOT_MOUNT = 77


def big_files(step):
    """Return files of several pages each."""
    return {name: {"w": torch.full((2 * PAGE // 4 + 100,), float(step))} for name in ("model", "optimizer")}


def check_failure(store, before):
    """Check that a save fails with path, reason and size, and leaves earlier checkpoints unchanged."""
    message = r"step-00000002.* could not be written: .*\. Free disk space: the checkpoint needs [\d,]{6,} bytes"
    with pytest.raises(CheckpointError, match=message) as caught:
        store.save(2, big_files(2), {"text": "x" * 5000})
    assert {path.name for path in store.folder.iterdir()} == {"step-00000001"}
    assert store.latest()[0].files()["model"]["w"].tolist() == before
    return str(caught.value)


def test_a_limit_on_file_size(store):
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


def test_metrics_that_do_not_fit_are_a_warning(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.write("step", step=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for free_bytes in (0, 10):  # nothing of the line fits, or a part of it
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + free_bytes, hard))
        try:
            with pytest.warns(UserWarning, match=r"metrics\.jsonl could not be written: .* Free some space"):
                log.write("step", step=2)
            log.write("step", step=3)  # warned of once, until a write succeeds
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        log.write("step", step=4)
    log.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 4, 4]


def mount_small_disk(folder, size):
    """Mount a file system of `size` bytes in a new mount namespace."""
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
    before, ballast, messages = big_files(1)["model"]["w"].tolist(), folder / "ballast", []
    for free_pages in range(9):  # the save needs ten
        with ballast.open("wb") as file:
            file.write(bytes((os.statvfs(folder).f_bavail - free_pages) * PAGE))
        messages.append(check_failure(store, before))
        ballast.unlink()
    for step in (2, 3, 4):
        store.save(step, big_files(step), {})
    assert store.steps() == [3, 4]
    for file in ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"):
        assert any(file in message for message in messages), messages


@needs_linux
def test_a_small_disk_with_any_number_of_free_pages(tmp_path):
    def mount_and_fill():
        try:
            mount_small_disk(tmp_path, 60 * PAGE)
        except OSError:
            sys.exit(CANNOT_MOUNT)
        fill_at_every_size(tmp_path)

    code = exit_code(fork(mount_and_fill))
    if code == CANNOT_MOUNT:
        pytest.skip("this system does not allow unprivileged mounts")
    assert code == 0
    assert not list(tmp_path.iterdir())  # the files were on the mounted disk
