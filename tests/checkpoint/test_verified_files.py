import hashlib
import os
import stat

import pytest

from homebrew.checkpoint.verified_files import (
    is_regular,
    make_folder,
    read_bounded,
    read_verified,
    remove_folder,
    verify,
    write_durably,
)
from homebrew.errors import CheckpointError, CorruptCheckpoint

DATA = os.urandom(3 << 20)
FACTS = {"size": len(DATA), "sha256": hashlib.sha256(DATA).hexdigest()}


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_mode_follows_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_durably(tmp_path / "file", b"data")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


def test_written_bytes_are_read_again(tmp_path):
    path = tmp_path / "file"
    write_durably(path, DATA)
    assert read_bounded(path, max_bytes=len(DATA)) == DATA
    assert read_verified(path, **FACTS) == DATA
    verify(path, **FACTS)
    assert is_regular(path, size=len(DATA))


def test_an_existing_file_is_not_written_over(tmp_path):
    write_durably(tmp_path / "file", b"data")
    with pytest.raises(CheckpointError, match=r"file \(3,145,728 bytes\) could not be written: File exists"):
        write_durably(tmp_path / "file", DATA)


def test_too_long(tmp_path):
    write_durably(tmp_path / "file", b"data")
    with pytest.raises(CorruptCheckpoint, match="has 4 bytes; at most 3"):
        read_bounded(tmp_path / "file", max_bytes=3)


def link(path):
    path.with_name("target").write_bytes(DATA)
    path.symlink_to("target")


HOSTILE = {"link": link, "pipe": os.mkfifo, "folder": os.mkdir, "nothing": lambda path: None}


@pytest.mark.parametrize("kind", HOSTILE)
def test_only_regular_files_are_read(tmp_path, kind):
    path = tmp_path / "file"
    HOSTILE[kind](path)
    for read in (
        lambda: read_bounded(path, max_bytes=1 << 30),
        lambda: read_verified(path, **FACTS),
        lambda: verify(path, **FACTS),
    ):
        with pytest.raises(CorruptCheckpoint, match="file"):
            read()
    assert not is_regular(path, size=len(DATA))


@pytest.mark.parametrize("change", ["longer", "shorter", "other"])
def test_another_file_than_described(tmp_path, change):
    path = tmp_path / "file"
    path.write_bytes({"longer": DATA + b"x", "shorter": DATA[:-1], "other": b"x" + DATA[1:]}[change])
    for check in (read_verified, verify):
        with pytest.raises(CorruptCheckpoint, match="SHA-256" if change == "other" else "its manifest says 3,145,728"):
            check(path, **FACTS)


def test_a_huge_file_is_refused_before_memory_is_taken(tmp_path):
    with (tmp_path / "file").open("wb") as file:
        file.truncate(1 << 40)  # a hole: it takes no disk either
    with pytest.raises(CorruptCheckpoint, match="1,099,511,627,776 bytes"):
        read_verified(tmp_path / "file", **FACTS)


def test_removing_a_folder_follows_no_link(tmp_path):
    make_folder(tmp_path / "a" / "b")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "kept").touch()
    (tmp_path / "a" / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "direct").symlink_to(tmp_path / "outside")
    for name in ("a", "direct", "never there"):
        remove_folder(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["outside"]
    assert (tmp_path / "outside" / "kept").exists()
