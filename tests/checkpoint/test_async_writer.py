import threading

import pytest

from homebrew.checkpoint.async_writer import AsyncWriter


def test_writes_do_not_overlap_and_close_waits():
    writer, proceed, done = AsyncWriter(), threading.Event(), []

    def write():
        proceed.wait(10)
        done.append("first")

    writer.start(write, name="first")
    assert writer.is_writing(0.01)
    threading.Timer(0.1, proceed.set).start()
    writer.start(lambda: done.append("second"), name="second")
    assert done[0] == "first"
    writer.close()
    assert done == ["first", "second"]
    assert not writer.is_writing(0)


def test_an_error_is_raised_once():
    def fail():
        raise OSError("no space")

    writer = AsyncWriter()
    writer.start(fail, name="fails")
    writer.close()
    assert writer.failed
    with pytest.raises(OSError, match="no space"):
        writer.start(print, name="next")  # is not called
    assert not writer.failed
    writer.wait()
