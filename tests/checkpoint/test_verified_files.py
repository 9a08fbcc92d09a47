import hashlib
import os

import pytest

from homebrew.checkpoint.verified_files import Entry, is_regular, measure, read_verified, verify
from homebrew.errors import CorruptCheckpoint

DATA = os.urandom(3 << 20)
ENTRY = Entry(len(DATA), hashlib.sha256(DATA).hexdigest())


def test_reads_and_verifies_a_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(DATA)
    assert read_verified(path, ENTRY) == DATA
    verify(path, ENTRY)
    assert measure(path) == ENTRY
    assert is_regular(path, size=len(DATA))


def make_link(path):
    path.with_name("target").write_bytes(DATA)
    path.symlink_to("target")


NOT_REGULAR = {"link": make_link, "pipe": os.mkfifo, "directory": os.mkdir, "missing": lambda path: None}


@pytest.mark.parametrize("kind", NOT_REGULAR)
def test_only_regular_files_are_read(tmp_path, kind):
    path = tmp_path / "file"
    NOT_REGULAR[kind](path)
    for read in (
        lambda: read_verified(path, ENTRY),
        lambda: verify(path, ENTRY),
        lambda: measure(path),
    ):
        with pytest.raises(CorruptCheckpoint, match="cannot be read"):
            read()
    assert not is_regular(path, size=len(DATA))


@pytest.mark.parametrize("change", ["longer", "shorter", "other"])
def test_a_file_that_differs_from_its_entry_is_refused(tmp_path, change):
    path = tmp_path / "file"
    path.write_bytes({"longer": DATA + b"x", "shorter": DATA[:-1], "other": bytes([DATA[0] ^ 1]) + DATA[1:]}[change])
    for check in (read_verified, verify):
        with pytest.raises(CorruptCheckpoint, match="SHA-256" if change == "other" else "its manifest says 3,145,728"):
            check(path, ENTRY)


def test_a_huge_file_is_refused_before_memory_is_allocated(tmp_path):
    with (tmp_path / "file").open("wb") as file:
        file.truncate(1 << 40)  # sparse: it takes no disk space
    with pytest.raises(CorruptCheckpoint, match="1,099,511,627,776 bytes"):
        read_verified(tmp_path / "file", ENTRY)
