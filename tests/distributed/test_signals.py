import os
import signal
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


def test_a_stop_signal_that_the_block_did_not_handle_ends_the_process():
    with pytest.raises(SystemExit) as caught, SignalHandler():
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.code == 143
    with pytest.raises(ValueError, match="the run's error"), SignalHandler():
        os.kill(os.getpid(), signal.SIGTERM)
        raise ValueError("the run's error")


@pytest.mark.parametrize("popped", [False, True])
def test_second_sigint_raises_immediately(popped):
    with SignalHandler() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        if popped:
            signals.pop_flags()
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
def test_exit_codes(number, code):
    assert ends_run(number)
    with pytest.raises(SystemExit) as caught:
        exit_for_signal(number)
    assert caught.value.code == code
