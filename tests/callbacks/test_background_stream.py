import os
import pty
import threading
import time
from contextlib import closing
from types import SimpleNamespace

import pytest
from child_processes import exit_code, fork
from platforms import needs_linux

from homebrew.callbacks import background_stream
from homebrew.callbacks.background_stream import BackgroundStream


@pytest.fixture
def pipe():
    """The reading end of a pipe, and a buffered text stream into it."""
    read, write = os.pipe()
    with os.fdopen(read, "rb") as reader, os.fdopen(write, "w") as stream:
        yield reader, stream


@pytest.mark.parametrize("open_ends", [os.pipe, pty.openpty])
def test_a_stopped_reader_blocks_neither_writes_nor_close(open_ends, monkeypatch):
    monkeypatch.setattr(background_stream, "PATIENCE_SECONDS", 0.1)
    read, write = open_ends()
    stream = BackgroundStream(os.fdopen(write, "w"))
    for i in range(2 * background_stream.MAX_PENDING):
        stream.write(f"{i}".rjust(1000) + "\n")
    stream.close()
    with os.fdopen(read, "rb") as reader:
        assert [int(reader.readline()) for _ in range(3)] == [0, 1, 2]  # what was written before is complete
    stream._thread.join()  # ends, because the reader is gone
    stream._stream.close()


def test_a_slow_reader_gets_everything(pipe):
    reader, file = pipe
    lines = []

    def read():
        for _ in range(500):
            lines.append(reader.readline())
            time.sleep(1e-4)

    thread = threading.Thread(target=read)
    thread.start()
    with closing(BackgroundStream(file)) as stream:
        for i in range(500):
            stream.write(f"{i:500}\n")
    thread.join()
    assert [int(line) for line in lines] == list(range(500))


def test_text_keeps_its_order_with_prints_to_the_same_stream(pipe):
    reader, file = pipe
    for i in range(3):
        print(f"print {i}", file=file)  # stays in the buffer
        with closing(BackgroundStream(file)) as stream:
            stream.write(f"display {i}\n")
    lines = [reader.readline().decode().strip() for _ in range(6)]
    assert lines == [f"{source} {i}" for i in range(3) for source in ("print", "display")]


def test_after_the_reader_has_exited_prints_do_not_fail(pipe):
    reader, file = pipe
    reader.close()
    with closing(BackgroundStream(file)) as stream:
        stream.write("text")
    print("text", file=file, flush=True)


@needs_linux
def test_text_is_dropped_if_the_disk_is_full_or_the_stream_closed():
    with open("/dev/full", "w") as file, closing(BackgroundStream(file)) as stream:  # noqa: PTH123
        stream.write("text")
    with closing(BackgroundStream(file)) as stream:
        stream.write("text")


def test_a_custom_stream_gets_all_text():
    """A stream that copies to a terminal and a file needs no more than `write` and `flush`."""

    texts = []
    tee = SimpleNamespace(write=texts.append, flush=lambda: None)
    with closing(BackgroundStream(tee)) as stream:
        stream.write("text")
        assert not stream.isatty()
    assert texts == ["text"]


def test_characters_that_the_terminal_cannot_encode_are_replaced(tmp_path):
    path = tmp_path / "ascii.txt"
    with path.open("w", encoding="ascii") as file, closing(BackgroundStream(file)) as stream:
        stream.write("2 × 3\n")
    assert path.read_text() == "2 ? 3\n"


def test_a_forked_process_can_print(pipe):
    """Workers of a data loader are forked, and have no copy of the thread."""
    reader, file = pipe
    with closing(BackgroundStream(file)) as stream:
        assert exit_code(fork(lambda: stream.write("from the worker\n"))) == 0
    assert reader.readline() == b"from the worker\n"
