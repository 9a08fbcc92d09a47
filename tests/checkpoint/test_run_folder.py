"""The lock on a run's folder, and an earlier run in it."""

import contextlib
import errno
import fcntl
import multiprocessing
import os
import signal
import socket
import subprocess
import sys

import pytest
from child_processes import fork

from homebrew.checkpoint.run_folder import LOCK_FILE, RunLock, move_run_aside
from homebrew.errors import ConfigError


@contextlib.contextmanager
def child(work):
    """Fork a process that calls `work`, says so through a pipe, and then waits until it is killed."""
    ready, says = os.pipe()

    def say_and_wait():
        work()
        os.write(says, b"x")
        signal.pause()

    pid = fork(say_and_wait)
    os.close(says)
    try:
        assert os.read(ready, 1) == b"x"
        yield pid
    finally:
        os.close(ready)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def is_free(folder):
    lock = RunLock(folder)
    try:
        lock.acquire()
    except ConfigError:
        return False
    lock.release()
    return True


def test_the_second_process_is_told_who_holds_the_lock(tmp_path):
    with child(RunLock(tmp_path).acquire) as pid, pytest.raises(ConfigError, match=f"process {pid} on host") as caught:
        RunLock(tmp_path).acquire()
    assert socket.gethostname() in str(caught.value)
    assert is_free(tmp_path)  # it was killed


def test_a_second_lock_of_one_process_is_refused(tmp_path):
    first, second = RunLock(tmp_path / "new" / "run"), RunLock(tmp_path / "new" / "run")
    first.acquire()
    with pytest.raises(ConfigError, match=rf"another Trainer of this process \(process {os.getpid()}"):
        second.acquire()
    second.release()  # does not hold it
    assert not is_free(tmp_path / "new" / "run")
    first.release()
    second.acquire()
    second.release()


@pytest.mark.parametrize("in_child", [lambda lock: None, RunLock.release], ids=["lives on", "releases its copy"])
def test_a_forked_child_neither_keeps_nor_releases_the_lock(tmp_path, in_child):
    lock = RunLock(tmp_path)
    lock.acquire()
    with child(lambda: in_child(lock)):
        assert not is_free(tmp_path)
        lock.release()
        assert is_free(tmp_path)


@pytest.mark.parametrize("start", ["fork", "subprocess"])
def test_workers_do_not_keep_the_lock_of_a_killed_parent(tmp_path, start):
    def hold():
        RunLock(tmp_path).acquire()
        if start == "fork":
            worker = multiprocessing.get_context("fork").Process(target=signal.pause)
            worker.start()
        else:
            worker = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
        (tmp_path / "worker").write_text(str(worker.pid))

    with child(hold):
        assert not is_free(tmp_path)
    worker = int((tmp_path / "worker").read_text())
    os.kill(worker, 0)  # is alive
    assert is_free(tmp_path)
    os.kill(worker, signal.SIGKILL)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    lock = RunLock(tmp_path)
    with pytest.warns(UserWarning, match=f"no locks .{os.strerror(number)}"):
        lock.acquire()
    lock.release()


@pytest.mark.parametrize("text", [b"", b"\xff" * 1000, b"12 host\x1b[2J", b"1 2 3"])
def test_a_lock_file_with_other_contents_is_not_quoted(tmp_path, monkeypatch, text):
    monkeypatch.setattr("homebrew.checkpoint.run_folder._MAX_POLLS", 2)
    lock = RunLock(tmp_path)
    lock.acquire()
    (tmp_path / LOCK_FILE).write_bytes(text)
    with pytest.raises(ConfigError, match=r"is in use by another process\. "):
        RunLock(tmp_path).acquire()
    lock.release()


@pytest.mark.parametrize("make", ["link", "pipe", "folder"])
def test_a_lock_file_that_is_not_a_regular_file_is_refused(tmp_path, make):
    path, target = tmp_path / "run" / LOCK_FILE, tmp_path / "precious"
    path.parent.mkdir()
    target.write_text("content")
    {"link": lambda: path.symlink_to(target), "pipe": lambda: os.mkfifo(path), "folder": path.mkdir}[make]()
    with pytest.raises(ConfigError, match=rf"cannot be written to: {path}"):
        RunLock(path.parent).acquire()
    assert target.read_text() == "content"


def test_an_earlier_run_is_moved_aside_and_other_files_stay(tmp_path):
    move_run_aside(tmp_path)
    assert list(tmp_path.iterdir()) == []
    for number in (1, 2):
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "run.json").write_text(str(number))
        (tmp_path / "notes.txt").touch()
        (tmp_path / "old-3").mkdir(exist_ok=True)
        move_run_aside(tmp_path)
        assert sorted(path.name for path in (tmp_path / f"old-{number}").iterdir()) == ["checkpoints", "run.json"]
        assert (tmp_path / f"old-{number}" / "run.json").read_text() == str(number)
    (tmp_path / "metrics.jsonl").touch()  # of a run that saved no checkpoint
    move_run_aside(tmp_path)
    assert [path.name for path in (tmp_path / "old-4").iterdir()] == ["metrics.jsonl"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "old-1", "old-2", "old-3", "old-4"]


def test_a_run_that_cannot_be_moved_aside_is_an_error_with_its_path(tmp_path, monkeypatch):
    (tmp_path / "run.json").touch()

    def rename(source, _):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(source))

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(ConfigError, match=r"run\.json: Read-only file system"):
        move_run_aside(tmp_path)
