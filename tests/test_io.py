import errno
import os
import stat

import pytest
from safetensors.torch import save_file
from torch import ones

from homebrew.io import atomic_replace, fsync_directory, make_directory, remove_tree, write_durably


@pytest.fixture
def umask():
    previous = os.umask(0o027)
    yield
    os.umask(previous)


def test_atomic_replace_sets_the_mode_from_the_umask(tmp_path, umask):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"old")
    with atomic_replace(path) as temporary:
        save_file({"w": ones(2)}, temporary)  # creates files with mode 0600
        assert path.read_bytes() == b"old"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert path.read_bytes() != b"old"
    assert list(tmp_path.iterdir()) == [path]


def write_half(path):
    path.write_bytes(b"half of")
    raise KeyboardInterrupt


def test_atomic_replace_keeps_the_old_file_on_an_error(tmp_path):
    path = tmp_path / "book.tokens"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), atomic_replace(path) as temporary:
        write_half(temporary)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_replace_syncs_the_file_before_it_is_renamed_and_the_directory_after(tmp_path, monkeypatch):
    events = []

    def fsync(descriptor, sync=os.fsync):
        events.append("directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        events.append((tmp_path / "book").exists())
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with atomic_replace(tmp_path / "book") as temporary:
        temporary.write_bytes(b"text")
    assert events == ["file", False, "directory", True]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_write_durably_sets_the_mode_from_the_umask(tmp_path, mask):
    previous = os.umask(mask)
    try:
        write_durably(tmp_path / "file", b"da", b"ta")
    finally:
        os.umask(previous)
    assert (tmp_path / "file").read_bytes() == b"data"
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~mask


def test_write_durably_does_not_overwrite(tmp_path):
    write_durably(tmp_path / "file", b"data")
    with pytest.raises(FileExistsError):
        write_durably(tmp_path / "file", b"other")
    assert (tmp_path / "file").read_bytes() == b"data"


def test_write_durably_names_the_file_it_could_not_sync(tmp_path, monkeypatch):
    def fsync(_descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left") as caught:
        write_durably(tmp_path / "file", b"data")
    assert caught.value.filename == str(tmp_path / "file")


@pytest.mark.parametrize(("number", "is_error"), [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)])
def test_a_file_system_that_cannot_sync_directories_is_not_an_error(tmp_path, monkeypatch, number, is_error):
    def fsync(_descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    if is_error:
        with pytest.raises(OSError, match=os.strerror(number)):
            fsync_directory(tmp_path)
    else:
        fsync_directory(tmp_path)


def test_remove_tree_does_not_follow_links(tmp_path):
    make_directory(tmp_path / "a" / "b")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "kept").touch()
    (tmp_path / "a" / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "direct").symlink_to(tmp_path / "outside")
    for name in ("a", "direct", "missing"):
        remove_tree(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["outside"]
    assert (tmp_path / "outside" / "kept").exists()
