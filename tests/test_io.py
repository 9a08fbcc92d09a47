import errno
import json
import math
import os
import stat
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file
from torch import ones

from homebrew.errors import DataError
from homebrew.io import (
    atomic_replace,
    fsync_directory,
    make_directory,
    open_regular,
    remove_leftovers,
    remove_tree,
    strict_json,
    write_durably,
    write_errors,
)


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


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space"), KeyboardInterrupt()])
def test_atomic_replace_raises_the_first_error_on_a_file_system_that_became_read_only(tmp_path, monkeypatch, error):
    def unlink(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "unlink", unlink)
    with pytest.raises(type(error)) as caught, atomic_replace(tmp_path / "book"):
        raise error
    assert caught.value is error


def test_atomic_replace_names_the_file_it_could_not_sync(tmp_path, monkeypatch):
    def fsync(_descriptor):
        raise OSError(errno.EDQUOT, "Quota exceeded")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match=r"Quota exceeded: '.*book"), atomic_replace(tmp_path / "book"):
        pass


@pytest.mark.parametrize("name", ["missing/a", "file/a", "folder"])
def test_errors_of_writing_name_the_file_and_not_a_temporary_one(tmp_path, name):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    path = tmp_path / name
    with (
        pytest.raises(DataError, match=rf"^{path} cannot be written: .*\. Move it\."),
        write_errors(tmp_path, DataError, "Move it."),
        atomic_replace(path) as temporary,
    ):
        temporary.touch()
    with pytest.raises(DataError, match=rf"^{path} cannot"), write_errors(path, DataError, "Move it."):
        raise OSError(errno.ENOSPC, "No space left on device")  # as of a descriptor


def test_leftovers_of_killed_replacements_are_removed_and_nothing_else(tmp_path):
    kept = [".run.json.mine", ".run.json.12345678.txt", ".run_json.12345678", ".other.json.12345678", "run.json"]
    for name in [*kept, ".run.json.0123abcd", ".run.json.ffffffff"]:
        (tmp_path / name).touch()
    (tmp_path / ".run.json.00000000").mkdir()  # cannot be one
    remove_leftovers(tmp_path / "run.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, ".run.json.00000000"])
    remove_leftovers(tmp_path / "missing" / "run.json")


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
        with pytest.raises(OSError, match=f"{os.strerror(number)}: '{tmp_path}"):
            fsync_directory(tmp_path)
    else:
        fsync_directory(tmp_path)


def num_open_files():
    return len(list(Path("/dev/fd").iterdir()))


def link_to(target):
    return lambda path: path.symlink_to(target)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (link_to("target"), "Is a symbolic link"),
        (link_to("/dev/zero"), "Is a symbolic link"),
        (link_to("missing"), "Is a symbolic link"),
        (os.mkfifo, "Not a regular file|No such device"),
        (os.mkdir, "Not a regular file|Is a directory"),
    ],
    ids=["link", "link to a device", "dangling link", "pipe", "directory"],
)
@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR | os.O_APPEND | os.O_CREAT, os.O_WRONLY | os.O_CREAT])
def test_only_regular_files_are_opened(tmp_path, make, reason, flags):
    (tmp_path / "target").write_bytes(b"kept")
    make(path := tmp_path / "file")
    before = num_open_files()
    with pytest.raises(OSError, match=reason) as caught:
        open_regular(path, flags)
    assert caught.value.filename in (path, str(path))
    assert num_open_files() == before
    assert (tmp_path / "target").read_bytes() == b"kept"
    assert not (tmp_path / "missing").exists()


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/null", "a\0b", "missing", "a" * 300])
def test_devices_and_impossible_names_are_os_errors(path):
    with pytest.raises(OSError, match=r"\w") as caught:
        open_regular(path)
    assert caught.value.strerror


def test_a_regular_file_is_opened_with_the_flags(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    path = tmp_path / "link" / "file"  # a linked folder is not the file's link
    for expected in (b"line", b"lineline"):
        descriptor = open_regular(path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, b"line")
        os.close(descriptor)
        assert path.read_bytes() == expected


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


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, np.float64("nan")])
def test_strict_json_writes_null_for_numbers_that_json_does_not_have(number):
    nested = {"a": number, "b": [1, (number, {"c": number})], "d": {number: 0.5}}
    assert strict_json(nested) == '{"a": null, "b": [1, [null, {"c": null}]], "d": {"null": 0.5}}'


def test_strict_json_keeps_everything_else():
    value = {"a": [1, -0.0, 1e308, True, None, "NaN", "\u20ac"], "b": {"c": {}}}
    assert json.loads(strict_json(value, indent=2)) == value
    assert strict_json({"path": os.devnull, "other": {1j}}, default=str) == '{"path": "/dev/null", "other": "{1j}"}'
