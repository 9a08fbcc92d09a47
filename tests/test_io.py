import errno
import os
import stat

import pytest
from safetensors.torch import save_file
from torch import ones

from homebrew.io import atomic_replace, fsync_directory


@pytest.fixture
def umask():
    before = os.umask(0o027)
    yield
    os.umask(before)


def test_what_is_written_takes_the_place_with_the_umasks_mode(tmp_path, umask):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"old")
    with atomic_replace(path) as new:
        save_file({"w": ones(2)}, new)  # whose own mode would be 0600
        assert path.read_bytes() == b"old"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert path.read_bytes() != b"old"
    assert list(tmp_path.iterdir()) == [path]


def interrupted(new):
    new.write_bytes(b"half of")
    raise KeyboardInterrupt


def test_what_fails_leaves_what_stood_there(tmp_path):
    path = tmp_path / "book.tokens"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), atomic_replace(path) as new:
        interrupted(new)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_is_on_the_disk_before_its_name_and_then_the_folder(tmp_path, monkeypatch):
    done = []

    def fsync(descriptor, sync=os.fsync):
        done.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        done.append((tmp_path / "book").exists())
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with atomic_replace(tmp_path / "book") as new:
        new.write_bytes(b"text")
    assert done == ["file", False, "folder", True]


@pytest.mark.parametrize(("number", "is_error"), [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)])
def test_a_file_system_that_cannot_sync_a_folder_is_no_error(tmp_path, monkeypatch, number, is_error):
    def fsync(_descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    if is_error:
        with pytest.raises(OSError, match=os.strerror(number)):
            fsync_directory(tmp_path)
    else:
        fsync_directory(tmp_path)
