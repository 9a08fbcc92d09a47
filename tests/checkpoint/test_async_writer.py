import os
import signal
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


WAITS = {
    "close": lambda writer: writer.close(),
    "wait": lambda writer: writer.wait(),
    "is_writing": lambda writer: writer.is_writing(60),
    "start": lambda writer: writer.start(lambda: None, name="never"),
}


@pytest.mark.parametrize("interrupts", [1, 3])
@pytest.mark.parametrize("wait", WAITS)
def test_an_interrupted_wait_neither_loses_the_write_nor_lets_another_overlap_it(wait, interrupts):
    """Ctrl-C raises KeyboardInterrupt in the middle of the wait."""
    writer, proceed, done = AsyncWriter(), threading.Event(), []

    def interrupted_wait():
        threading.Timer(0.05, os.kill, [os.getpid(), signal.SIGINT]).start()
        WAITS[wait](writer)

    writer.start(lambda: (proceed.wait(60), done.append("first")), name="first")
    for _ in range(interrupts):
        with pytest.raises(KeyboardInterrupt):
            interrupted_wait()
        assert writer.is_writing(0)
    threading.Timer(0.05, proceed.set).start()
    writer.start(lambda: done.append("second"), name="second")
    writer.wait()
    assert done == ["first", "second"]


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), KeyboardInterrupt()])
@pytest.mark.parametrize("is_started", [False, True])
def test_an_error_while_the_thread_starts_leaves_a_usable_writer(monkeypatch, error, is_started):
    start = threading.Thread.start

    def fail(thread):
        if is_started:
            start(thread)
        raise error

    writer, done = AsyncWriter(), []
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        with pytest.raises(type(error)):
            writer.start(lambda: done.append("first"), name="first")
    writer.start(lambda: done.append("second"), name="second")
    writer.wait()
    assert done[-1] == "second"
    assert is_started or len(done) == 1
