"""Who is named when processes lose each other, here threads over a store like the launcher's."""

import threading
from types import SimpleNamespace

import pytest
from torch.distributed import TCPStore

from homebrew.distributed import heartbeat
from homebrew.distributed.heartbeat import Heartbeat
from homebrew.errors import TrainingError

LOST = RuntimeError("gloo: connection closed by peer")


@pytest.fixture
def beat(monkeypatch):
    """Makes a process's, of three."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setattr(heartbeat, "INTERVAL_SECONDS", 0.02)
    monkeypatch.setattr(heartbeat, "PATIENCE_SECONDS", 1.0)
    made = []

    def make(rank):
        made.append(Heartbeat(SimpleNamespace(process_index=rank, num_processes=3)))
        return made[-1]

    yield make
    for each in made:  # before the store ends
        each._ended.set()
        each._thread.join()


def ends(beat, error):
    """What a process's heartbeat makes of an error."""
    with pytest.raises(TrainingError) as told:
        beat.__exit__(type(error), error, None)
    return str(told.value)


def test_who_left_because_of_another_is_not_named(beat):
    first, second, third = (beat(rank).__enter__() for rank in range(3))
    third._ended.set()  # as if killed
    third._thread.join()
    assert "3 processes no longer there, or stuck: 2 on " in ends(second, LOST)
    told = ends(first, LOST)
    assert "3 processes no longer there, or stuck: 2 on " in told
    assert "1 on" not in told


def test_an_error_of_its_own_names_nobody(beat):
    with pytest.raises(ValueError, match="mine"), beat(0):
        raise ValueError("mine")


def test_all_are_there(beat):
    first, _, _ = (beat(rank).__enter__() for rank in range(3))
    assert "though all of them are there" in ends(first, LOST)


def test_the_beats_have_ended_when_it_is_left(monkeypatch):
    """A thread still in the store while Python ends would take the process down with SIGABRT."""
    beating, released = threading.Event(), threading.Event()

    class Slow:
        set = delete_key = staticmethod(lambda *_: None)

        def add(self, *_):
            if threading.current_thread() is not threading.main_thread():
                beating.set()
                released.wait(1)

    monkeypatch.setattr(heartbeat, "connect", lambda _: Slow())
    monkeypatch.setattr(heartbeat, "INTERVAL_SECONDS", 0.01)
    with Heartbeat(SimpleNamespace(process_index=0, num_processes=2)) as entered:
        assert beating.wait(10)
        threading.Timer(0.1, released.set).start()
    assert not entered._thread.is_alive()
