import contextlib
import io
import os
import signal
import sys
import threading

import pytest

from homebrew.distributed.signals import HANDLED_SIGNALS, SignalHandler, ends_run, exit_for_signal

NO_FLAGS = [0.0] * len(HANDLED_SIGNALS)


@pytest.fixture(autouse=True)
def default_sighup():
    """The tests may run under nohup, which ignores SIGHUP."""
    previous = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, previous)


def test_records_signals_and_restores_the_handlers():
    before = [signal.getsignal(number) for number in HANDLED_SIGNALS]
    with SignalHandler() as signals:
        assert signals.pop_flags() == NO_FLAGS
        for number in HANDLED_SIGNALS:
            os.kill(os.getpid(), number)
        assert signals.pop_flags() == [1.0] * len(HANDLED_SIGNALS)
        assert signals.pop_flags() == NO_FLAGS
    assert [signal.getsignal(number) for number in HANDLED_SIGNALS] == before


def receive(*numbers, error=None):
    """Receive signals in a block that does not handle them."""
    with SignalHandler():
        for number in numbers:
            os.kill(os.getpid(), number)
        if error:
            raise error


def test_a_stop_signal_that_the_block_has_not_handled_ends_the_process():
    with pytest.raises(SystemExit) as caught:
        receive(signal.SIGUSR1, signal.SIGTERM)
    assert caught.value.code == 143
    receive(signal.SIGUSR1)
    with pytest.raises(ValueError, match="the run's error"):
        receive(signal.SIGTERM, error=ValueError("the run's error"))


@pytest.mark.parametrize("announce", [True, False])
def test_the_first_interrupt_says_what_a_second_one_does(monkeypatch, announce):
    read, write = os.pipe()
    with os.fdopen(read) as reader, os.fdopen(write, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        with SignalHandler(announce=announce) as signals:
            os.kill(os.getpid(), signal.SIGINT)
            signals.pop_flags()
        stderr.close()
        message = reader.read()
    assert ("Ctrl-C again" in message) == announce


@pytest.mark.parametrize("stderr", ["stopped", "closed", "none", "no descriptor"])
def test_the_announcement_neither_blocks_nor_fails(monkeypatch, stderr):
    read, write = os.pipe()
    os.set_blocking(write, False)
    with contextlib.suppress(BlockingIOError):
        while stderr == "stopped":
            os.write(write, b"-" * 100)
    os.set_blocking(write, True)
    with os.fdopen(read), os.fdopen(write, "w") as stream:
        if stderr == "closed":
            stream.close()
        monkeypatch.setattr(sys, "stderr", {"none": None, "no descriptor": io.StringIO()}.get(stderr, stream))
        with SignalHandler(announce=True) as signals:
            os.kill(os.getpid(), signal.SIGINT)
            assert any(signals.pop_flags())


@pytest.mark.parametrize("variable", [None, "TORCHELASTIC_RUN_ID"])
@pytest.mark.parametrize("popped", [False, True])
def test_second_sigint_raises_immediately(popped, variable, monkeypatch):
    if variable:  # of torchrun and `accelerate launch`, whose ranks receive only what their launcher sends
        monkeypatch.setenv(variable, "none")
    with SignalHandler() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        if popped:
            signals.pop_flags()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        signals.pop_flags()


def test_a_process_forked_by_a_launcher_receives_each_interrupt_twice(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr("multiprocessing.parent_process", lambda: "the notebook's process")
    with SignalHandler() as signals:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        assert sum(signals.pop_flags()) == 1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        signals.pop_flags()


def test_handles_no_signals_outside_the_main_thread():
    flags = []

    def run():
        with SignalHandler() as signals:
            flags.append(signals.pop_flags())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert flags == [NO_FLAGS]


def test_sighup_stays_ignored_under_nohup():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with SignalHandler() as signals:
        os.kill(os.getpid(), signal.SIGHUP)
        assert signals.pop_flags() == NO_FLAGS
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_exit_codes(number, code, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipykernel", None)  # also imported by clients of notebooks
    assert ends_run(number)
    with pytest.raises(SystemExit) as caught:
        exit_for_signal(number)
    assert caught.value.code == code
