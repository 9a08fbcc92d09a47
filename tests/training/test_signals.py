import os
import signal
import threading

import pytest

from homebrew.training.signals import HANDLED, SignalWatch, leave


def test_remembers_signals_and_restores_the_handlers():
    before = [signal.getsignal(number) for number in HANDLED]
    with SignalWatch() as watch:
        assert watch.flags() == [0.0] * len(HANDLED)
        for number in HANDLED:
            os.kill(os.getpid(), number)
        assert watch.flags() == [1.0] * len(HANDLED)
        watch.take(signal.SIGTERM)
        assert watch.flags()[HANDLED.index(signal.SIGTERM)] == 0.0
    assert [signal.getsignal(number) for number in HANDLED] == before


def test_a_second_interrupt_leaves_at_once():
    with SignalWatch():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_other_threads_watch_nothing():
    seen = []

    def run():
        with SignalWatch() as watch:
            seen.append(watch.flags())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [[0.0] * len(HANDLED)]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_exit_codes(number, code):
    with pytest.raises(SystemExit) as caught:
        leave(number)
    assert caught.value.code == code
