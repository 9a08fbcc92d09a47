"""One thing at a time, and no error lost."""

import threading

import pytest

from homebrew.checkpoint.async_writer import AsyncWriter


def test_two_writes_never_overlap_and_close_waits():
    writer, go, done = AsyncWriter(), threading.Event(), []

    def write():
        go.wait(10)
        done.append(len(done))

    writer.start(write, name="first")
    assert writer.is_writing(0.01)
    threading.Timer(0.1, go.set).start()
    writer.start(lambda: done.append("second"), name="second")
    assert done[0] == 0
    writer.close()
    assert done == [0, "second"]
    assert not writer.is_writing(0)


def test_an_error_is_raised_once():
    def fail():
        raise OSError("no space")

    writer = AsyncWriter()
    writer.start(fail, name="fails")
    writer.close()
    assert writer.failed
    with pytest.raises(OSError, match="no space"):
        writer.start(print, name="next")  # and does not begin
    assert not writer.failed
    writer.wait()
