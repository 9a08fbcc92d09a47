import os
import signal
import threading

import pytest

from homebrew.distributed.signals import HANDLED_SIGNALS, SignalHandler, leave


def test_remembers_signals_and_restores_the_handlers():
    before = [signal.getsignal(number) for number in HANDLED_SIGNALS]
    with SignalHandler() as watch:
        assert watch.take() == [0.0] * len(HANDLED_SIGNALS)
        for number in HANDLED_SIGNALS:
            os.kill(os.getpid(), number)
        assert watch.take() == [1.0] * len(HANDLED_SIGNALS)
        assert watch.take() == [0.0] * len(HANDLED_SIGNALS)  # each is told once
    assert [signal.getsignal(number) for number in HANDLED_SIGNALS] == before


@pytest.mark.parametrize("taken", [False, True])
def test_a_second_interrupt_leaves_at_once(taken):
    with SignalHandler() as watch:
        os.kill(os.getpid(), signal.SIGINT)
        if taken:
            watch.take()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_other_threads_watch_nothing():
    seen = []

    def run():
        with SignalHandler() as watch:
            seen.append(watch.take())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [[0.0] * len(HANDLED_SIGNALS)]


def test_what_the_process_ignores_stays_ignored():
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as `nohup` does
    try:
        with SignalHandler() as watch:
            os.kill(os.getpid(), signal.SIGHUP)
            assert watch.take() == [0.0] * len(HANDLED_SIGNALS)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, previous)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_exit_codes(number, code):
    with pytest.raises(SystemExit) as caught:
        leave(number)
    assert caught.value.code == code
