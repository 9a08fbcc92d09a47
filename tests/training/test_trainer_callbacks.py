"""Callbacks: when events are emitted, and what a callback may do in them."""

import contextlib
import errno
import io
import os
import pty
import sys
import threading
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from rich.console import Console
from tiny_runs import RaiseAt, Recorder, StopAt, equal, make_trainer, saved_steps, token_dataset, weights

from homebrew import GPT, ProgressDisplay
from homebrew.callbacks import background_stream
from homebrew.callbacks.base import Callback
from homebrew.errors import CheckpointError, ConfigError


def test_a_callback_can_check_the_trainer_at_its_construction(tmp_path):
    class NeedsSaves(Callback):
        def on_init_end(self, trainer):
            if trainer.config.save_every is None:
                raise ConfigError("save_every is None")

    make_trainer(tmp_path, callbacks=[NeedsSaves()])
    with pytest.raises(ConfigError, match="save_every is None"):
        make_trainer(tmp_path, save_every=None, callbacks=[NeedsSaves()])
    assert list(tmp_path.iterdir()) == []


def test_a_step_is_logged_after_the_next_step_is_launched(tmp_path):
    recorder = Recorder()
    settings = {"eval_dataset": token_dataset(200), "log_every": 2, "eval_every": 4, "max_steps": 9}
    make_trainer(tmp_path, **settings, callbacks=[recorder]).train()
    assert recorder.logged_at == [(1, 2), (2, 3), (4, 4), (6, 7), (8, 8), (9, 9)]  # evaluations and the end wait


def test_a_stopped_run_logs_its_last_due_step(tmp_path):
    recorder, stop = Recorder(), StopAt(2)
    trainer = make_trainer(tmp_path, log_every=2, callbacks=[stop, recorder])
    trainer.train()
    assert recorder.logged_at == [(1, 2), (2, 2)]
    stop.step = 5
    trainer.train(resume=True)
    assert recorder.logged_at == [(1, 2), (2, 2), (4, 5)]


def test_a_step_not_yet_logged_when_a_run_fails_is_never_logged(tmp_path):
    recorder, failure = Recorder(), RaiseAt(2, KeyboardInterrupt())
    trainer = make_trainer(tmp_path, log_every=2, save_every=1, callbacks=[failure, recorder])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.save()
    assert recorder.logged_at == [(1, 1)]
    trainer.callbacks.remove(failure)
    trainer.train(resume=True)
    assert recorder.logged_at == [(1, 1), (4, 4), (6, 6)]


@pytest.mark.parametrize(("log_every", "save_every"), [(1, 1), (2, 2), (2, None)])
def test_a_callback_may_save_in_on_log(tmp_path, log_every, save_every):
    class SaveOnLog(Callback):
        def on_log(self, trainer, metrics):
            trainer.save()

    recorder = Recorder()
    settings = {"log_every": log_every, "save_every": save_every, "max_steps": 5, "keep_last": 9}
    make_trainer(tmp_path, **settings, callbacks=[SaveOnLog(), recorder]).train()
    assert list(recorder.losses) == ([1, 2, 3, 4, 5] if log_every == 1 else [1, 2, 4, 5])
    assert recorder.saved == sorted(set(recorder.saved))
    assert saved_steps(tmp_path) == recorder.saved


@pytest.mark.parametrize(
    ("event", "value"), [("on_step_end", True), ("on_log", -1), ("on_train_begin", "control"), ("on_train_end", 0)]
)
def test_a_callback_must_not_return_a_value(tmp_path, event, value):
    callback = Callback()
    setattr(callback, event, lambda trainer, *_: value)
    with pytest.raises(ConfigError, match=rf"Callback\.{event} returned {value!r}.*should_stop"):
        make_trainer(tmp_path, callbacks=[callback]).train()


@pytest.mark.parametrize("value", [torch.tensor(True), "yes", np.True_, 7])
def test_should_stop_may_be_any_true_value(tmp_path, value):
    class Stop(Callback):
        def on_step_end(self, trainer):
            trainer.should_stop = value if trainer.step == 2 else None

    trainer = make_trainer(tmp_path, callbacks=[Stop()])
    trainer.train()
    assert trainer.step == 2


class TrainsInside(Callback):
    """Trains in the middle of the first step's event, in this or in another thread."""

    def __init__(self, train):
        self.train = train

    def on_step_end(self, trainer):
        if trainer.step == 1:
            self.train()


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("micro_batch_size", [2, 4, 8])
def test_a_callback_can_train_another_model(tmp_path, micro_batch_size):
    alone = make_trainer(tmp_path / "alone", micro_batch_size=2)
    alone.train()
    inner = make_trainer(tmp_path / "inner", micro_batch_size=micro_batch_size)
    outer = make_trainer(tmp_path / "outer", micro_batch_size=2, callbacks=[TrainsInside(inner.train)])
    outer.train()
    assert equal(weights(outer), weights(alone))
    assert inner.step == outer.step


def test_a_second_thread_cannot_train(tmp_path):
    """Accelerate's gradient state is shared by the threads: both runs would have wrong gradients."""
    errors = []

    def train():
        try:
            make_trainer(tmp_path / "second").train()
        except ConfigError as error:
            errors.append(str(error))

    def train_in_thread():
        thread = threading.Thread(target=train)
        thread.start()
        thread.join()

    make_trainer(tmp_path / "first", callbacks=[TrainsInside(train_in_thread)]).train()
    assert len(errors) == 1
    assert "Another thread" in errors[0]
    train_in_thread()
    assert len(errors) == 1


def test_should_stop_ends_the_run_and_saves_it(tmp_path):
    make_trainer(tmp_path, callbacks=[StopAt(2)]).train()
    assert saved_steps(tmp_path) == [2]


class ClosedStdout(io.StringIO):
    """A standard output whose reader is gone: a closed pipe or terminal."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error


@pytest.mark.parametrize("error", [BrokenPipeError(errno.EPIPE, "Broken pipe"), OSError(errno.EIO, "I/O error")])
def test_training_continues_after_standard_output_is_closed(tmp_path, monkeypatch, error):
    monkeypatch.setattr(sys, "stdout", ClosedStdout(error))
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.train()
    assert trainer.step == 2


class FailsAtEnd(Callback):
    """Raises an error in `on_train_end`."""

    def __init__(self, error):
        self.error = error

    def on_train_end(self, trainer):
        raise self.error


class RecordsEnd(Callback):
    ended = False

    def on_train_end(self, trainer):
        self.ended = True


@pytest.mark.parametrize("first", [None, CheckpointError("disk full"), ValueError("custom"), KeyboardInterrupt()])
def test_an_error_at_the_end_hides_neither_the_first_error_nor_other_callbacks(tmp_path, first):
    second, third = OSError(errno.EROFS, "Read-only file system"), RuntimeError("no network")
    last = RecordsEnd()
    callbacks = [*([RaiseAt(2, first)] if first else []), FailsAtEnd(second), FailsAtEnd(third), last]
    trainer = make_trainer(tmp_path, callbacks=callbacks)
    with pytest.warns(UserWarning, match="on_train_end") as warned, pytest.raises(type(first or second)) as caught:
        trainer.train()
    assert caught.value is (first or second)
    others = [second, third] if first else [third]
    assert all(repr(other) in str(warning.message) for other, warning in zip(others, warned, strict=True))
    assert last.ended


def test_an_error_at_the_end_is_raised_also_while_another_is_handled(tmp_path):
    trainer = make_trainer(tmp_path, callbacks=[FailsAtEnd(OSError("at the end"))])
    try:
        raise ValueError("handled by the caller")
    except ValueError:
        with pytest.raises(OSError, match="at the end"):
            trainer.train()


def test_a_save_that_fails_after_a_failed_evaluation_is_a_warning(tmp_path, monkeypatch):
    class FailsToEvaluate(Callback):
        def on_evaluate(self, trainer, metrics):
            monkeypatch.setattr(trainer._checkpoints, "save", Mock(side_effect=CheckpointError("disk full")))
            raise ValueError("from a callback")

    trainer = make_trainer(tmp_path, max_steps=1, eval_dataset=token_dataset(200), callbacks=[FailsToEvaluate()])
    with pytest.warns(UserWarning, match="disk full"), pytest.raises(ValueError, match="from a callback"):
        trainer.train()


def test_training_without_a_standard_output(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)  # closed by the shell's `>&-`
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.train()
    assert trainer.step == 2


@pytest.mark.parametrize("kind", ["pipe", "terminal", "given console"])
def test_training_does_not_wait_for_a_reader_that_has_stopped(tmp_path, monkeypatch, kind):
    read, write = pty.openpty() if kind == "terminal" else os.pipe()
    os.set_blocking(write, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(write, b"-" * 100)
    os.set_blocking(write, True)
    monkeypatch.setattr(background_stream, "PATIENCE_SECONDS", 0.1)
    with os.fdopen(write, "w") as stream:
        if kind == "given console":
            callbacks = [ProgressDisplay(Console(file=stream))]
        else:
            monkeypatch.setattr(sys, "stdout", stream)
            callbacks = []
        trainer = make_trainer(tmp_path, max_steps=4, callbacks=callbacks)
        trainer.train()
        assert trainer.step == 4
        os.close(read)  # ends the display's thread
        [thread.join() for thread in threading.enumerate() if thread.name == "display"]


@pytest.fixture
def clock(monkeypatch):
    """A clock in place of the wall clock; on a CPU, because a GPU measures time by its own events."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("homebrew.metrics.throughput.time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def test_elapsed_seconds_include_one_forward_pass_per_step(tmp_path, clock):
    def advance(*_):
        clock.now += 1.0

    recorder = Recorder()
    trainer = make_trainer(tmp_path, callbacks=[recorder])
    trainer.model.register_forward_hook(advance)
    trainer.train()
    assert [metrics.elapsed_seconds for metrics in recorder.metrics.values()] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


def test_throughput_excludes_compiling_evaluating_and_saving(tmp_path, clock, monkeypatch):
    def advance(seconds):
        clock.now += seconds

    class SlowCallback(Callback):
        def on_train_begin(self, trainer):
            advance(50)

        def on_evaluate(self, trainer, metrics):
            advance(50)
            trainer.save()

        def on_save(self, trainer, path):
            advance(50)

        def on_step_end(self, trainer):
            if trainer.step == 2:
                trainer.evaluate()

        def on_log(self, trainer, metrics):
            trainer.evaluate()

    monkeypatch.setattr(GPT, "compile", lambda *_, **__: None)  # the warm-up pass remains
    recorder = Recorder()
    settings = {"eval_dataset": token_dataset(200), "eval_every": 3, "max_steps": 5, "compile": True}
    trainer = make_trainer(tmp_path, **settings, callbacks=[SlowCallback(), recorder])
    trainer.model.register_forward_hook(lambda *_: advance(0.5))  # in evaluation too
    trainer.train()
    assert [metrics.tokens_per_second for metrics in recorder.metrics.values()] == [8 * 16 / 0.5] * 5


@pytest.mark.filterwarnings("ignore:.*step 0:UserWarning")
@pytest.mark.parametrize("event", ["on_train_begin", "on_step_end", "on_save", "on_train_end"])
def test_train_in_a_callback_is_an_error(tmp_path, event):
    callback = Callback()
    setattr(callback, event, lambda trainer, *_: trainer.train(resume=True))
    trainer = make_trainer(tmp_path, callbacks=[callback])
    with pytest.raises(ConfigError, match=r"train\(\) was called while"):
        trainer.train()
    setattr(callback, event, lambda *_: None)
    trainer.train(resume=True)
    assert trainer.step == 6
