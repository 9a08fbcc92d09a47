"""Saving: when checkpoints are written, failed writes, signals, and the run's other files."""

import errno
import json
import math
import os
import shutil
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch
from tiny_runs import CONFIG, Recorder, StopAt, checkpoint_path, make_trainer, saved_steps, token_dataset

from homebrew import GPT
from homebrew.callbacks.base import Callback
from homebrew.checkpoint.manager import CheckpointManager
from homebrew.checkpoint.manifest import open_checkpoint
from homebrew.checkpoint.store import CheckpointStore
from homebrew.distributed.signals import HANDLED_SIGNALS
from homebrew.errors import CheckpointError


def test_metrics_jsonl_and_run_json_describe_the_run(tmp_path):
    trainer = make_trainer(tmp_path, eval_dataset=token_dataset(300), eval_every=3, save_every=3)
    trainer.train()
    events = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = {
        kind: [event["step"] for event in events if event["event"] == kind] for kind in ("step", "evaluate", "save")
    }
    assert steps == {"step": [1, 2, 3, 4, 5, 6], "evaluate": [3, 6], "save": [3, 6]}
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["model"]["n_layer"] == 2
    assert run["train_dataset"]["fingerprint"] == trainer.train_dataset.fingerprint


class BadLoss(GPT):
    """Has a loss of NaN in step 2 and in evaluations."""

    num_losses = 0

    def forward(self, input_ids, targets=None):
        self.num_losses += self.training
        return super().forward(input_ids, targets) * (math.nan if self.num_losses == 2 or not self.training else 1.0)


@pytest.mark.parametrize("max_grad_norm", [math.inf, None])
def test_every_json_file_of_a_run_is_strict(tmp_path, max_grad_norm):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    settings = {"eval_dataset": token_dataset(200), "eval_every": 2, "non_finite": "skip", "max_steps": 4}
    make_trainer(
        tmp_path, model=BadLoss(CONFIG), **settings, max_grad_norm=max_grad_norm, callbacks=[StopAt(2)]
    ).train()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    contents = [path.read_text() for path in tmp_path.rglob("*.json")]
    assert len(contents) == 3  # run.json, state.json, manifest.json
    events = [json.loads(text, parse_constant=refuse) for text in (*lines, *contents)]
    assert [event["loss"] for event in events if event.get("event") in ("evaluate", "step_skipped")] == [None, None]
    assert json.loads((tmp_path / "run.json").read_text())["config"]["max_grad_norm"] is None
    make_trainer(tmp_path, model=BadLoss(CONFIG), **settings, max_grad_norm=math.inf).train(resume=True)


@pytest.mark.parametrize(("max_grad_norm", "clips"), [(1e-3, True), (None, False), (math.inf, False)])
def test_max_grad_norm_may_be_disabled(tmp_path, max_grad_norm, clips):
    def train(name, max_grad_norm):
        model = GPT(CONFIG)
        sgd = torch.optim.SGD(model.parameters(), lr=1.0)
        make_trainer(tmp_path / name, model=model, optimizer=sgd, max_steps=1, max_grad_norm=max_grad_norm).train()
        return model.transformer.wte.weight

    # Not bitwise: the order of a GPU's sums varies.
    assert torch.allclose(train("run", max_grad_norm), train("expected", 1e9), atol=1e-5) is not clips


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_interactive_mode_saves_and_raises_keyboard_interrupt(tmp_path, monkeypatch, signal_number):
    class SendSignal(Callback):
        def on_step_end(self, trainer):
            if trainer.step == 3:
                os.kill(os.getpid(), signal_number)

    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    handlers = [signal.getsignal(number) for number in HANDLED_SIGNALS]
    trainer = make_trainer(tmp_path, callbacks=[SendSignal()])
    with pytest.raises(KeyboardInterrupt, match=signal_number.name):
        trainer.train()
    assert saved_steps(tmp_path) == [3]
    assert [signal.getsignal(number) for number in HANDLED_SIGNALS] == handlers
    trainer.train(resume=True)  # as in the next cell of a notebook
    assert trainer.step == 6


class SendSignalAt(Callback):
    """Sends a signal at one moment of `train()` outside the loop."""

    def __init__(self, moment, signal_number, monkeypatch):
        self.moment, self.signal_number = moment, signal_number
        self.patch(monkeypatch, CheckpointManager, "restore")
        self.patch(monkeypatch, CheckpointStore, "save")

    def patch(self, monkeypatch, owner, name):
        original = getattr(owner, name)

        def patched(*args, **kwargs):
            self.reach(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, patched)

    def reach(self, moment):
        if moment == self.moment:
            os.kill(os.getpid(), self.signal_number)

    def on_train_begin(self, trainer):
        self.reach("on_train_begin")

    def on_save(self, trainer, path):
        self.reach("on_save")

    def on_train_end(self, trainer):
        self.reach("on_train_end")


@pytest.mark.parametrize("moment", ["restore", "on_train_begin", "save", "on_save", "on_train_end"])
@pytest.mark.parametrize("signal_number", HANDLED_SIGNALS)
def test_a_signal_outside_the_loop_is_neither_lost_nor_fatal(tmp_path, monkeypatch, signal_number, moment):
    before_loop = moment in ("restore", "on_train_begin")
    trainer = make_trainer(tmp_path, max_steps=2, callbacks=[SendSignalAt(moment, signal_number, monkeypatch)])
    if signal_number == signal.SIGUSR1:
        trainer.train()
        assert saved_steps(tmp_path) == ([1, 2] if before_loop else [2])
        return
    with pytest.raises(SystemExit) as caught:
        trainer.train()
    assert caught.value.code == 128 + signal_number
    assert saved_steps(tmp_path) == ([1] if before_loop else [2])


class SlowWriter(Callback):
    """Interrupts the run at step 3, and again while it waits for its writer, which then takes its time."""

    def __init__(self, monkeypatch, num_interrupts):
        self.num_interrupts, self.proceed, self.running, self.overlap = num_interrupts, threading.Event(), 0, False
        save = CheckpointStore.save

        def slow_save(*args, **kwargs):
            self.overlap = self.overlap or self.running > 0
            self.running += 1
            self.interrupt()
            self.proceed.wait(60)
            try:
                return save(*args, **kwargs)
            finally:
                self.running -= 1

        monkeypatch.setattr(CheckpointStore, "save", slow_save)

    def on_step_end(self, trainer):
        if trainer.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    def interrupt(self):
        if not self.proceed.is_set():
            for i in range(self.num_interrupts):
                threading.Timer(0.1 * (i + 1), os.kill, [os.getpid(), signal.SIGINT]).start()
            threading.Timer(0.1 * (self.num_interrupts + 1), self.proceed.set).start()


@pytest.mark.parametrize("num_interrupts", [1, 2])
def test_interrupts_while_the_run_waits_for_its_writer_do_not_damage_the_save(tmp_path, monkeypatch, num_interrupts):
    writer = SlowWriter(monkeypatch, num_interrupts)
    trainer = make_trainer(tmp_path, callbacks=[writer])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train(resume=True)
    assert not writer.overlap
    assert trainer.step == 6
    assert [open_checkpoint(checkpoint_path(tmp_path, step)).step for step in saved_steps(tmp_path)] == [3, 6]


class BreakCheckpointFolder(Callback):
    """Replaces the checkpoint folder by a file, so that no checkpoint can be written."""

    def on_step_end(self, trainer):
        folder = trainer.config.output_dir / "checkpoints"
        if folder.is_dir():
            shutil.rmtree(folder)
            folder.touch()


def test_a_failed_save_raises_and_can_be_retried(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2, callbacks=[BreakCheckpointFolder()])
    with pytest.raises(CheckpointError, match="checkpoints"):
        trainer.train()
    (tmp_path / "checkpoints").unlink()
    assert (trainer.save() / "manifest.json").exists()


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EIO])
def test_a_file_system_that_fails_during_the_run_is_a_checkpoint_error_with_a_path(tmp_path, monkeypatch, number):
    class BreakFileSystem(Callback):
        def on_step_end(self, trainer):
            for name in ("write", "ftruncate", "fsync", "mkdir", "rename", "unlink", "rmdir"):
                patch.setattr(os, name, self.fail)

        def fail(self, path, *_, **__):
            raise OSError(number, os.strerror(number), *([str(path)] if isinstance(path, str | Path) else []))

    trainer = make_trainer(tmp_path, progress=False, callbacks=[BreakFileSystem()])
    with (
        monkeypatch.context() as patch,
        pytest.warns(UserWarning, match=r"metrics\.jsonl could not be written"),
        pytest.raises(CheckpointError, match=f"step-00000006.*{os.strerror(number)}"),
    ):
        trainer.train()
    assert trainer.save().is_dir()


def test_a_failed_save_is_a_warning_beside_the_error_that_ends_the_run(tmp_path):
    class RaiseOnSave(Callback):
        def on_save(self, trainer, path):
            raise ValueError("custom error")

    failures = [BreakCheckpointFolder(), RaiseOnSave()]
    trainer = make_trainer(tmp_path, max_steps=4, save_every=2, callbacks=failures)
    with pytest.warns(UserWarning, match="checkpoints"), pytest.raises(ValueError, match="custom error"):
        trainer.train()
    for callback in failures:
        trainer.callbacks.remove(callback)
    (tmp_path / "checkpoints").unlink()
    assert trainer.save().is_dir()  # a failed step does not count as saved
    trainer.train(resume=True)
    assert trainer.step == 4


def test_an_optimizer_with_state_that_cannot_be_saved_warns_once(tmp_path):
    class UnsavableState(torch.optim.SGD):
        def step(self, closure=None):
            super().step()
            for group in self.param_groups:
                for parameter in group["params"]:
                    self.state[parameter]["text"] = "abc"

    model = GPT(CONFIG)
    optimizer = UnsavableState(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="UnsavableState") as warned:
        make_trainer(tmp_path, model=model, optimizer=optimizer, save_every=2).train()
    assert [warning.filename for warning in warned] == [__file__]


def test_checkpoints_are_saved_every_save_every_steps_and_at_the_end(tmp_path):
    recorder = Recorder()
    make_trainer(tmp_path, save_every=4, callbacks=[recorder]).train()
    assert recorder.saved == saved_steps(tmp_path) == [4, 6]


def test_the_newest_keep_last_checkpoints_are_kept(tmp_path):
    make_trainer(tmp_path, save_every=1, keep_last=3).train()
    assert saved_steps(tmp_path) == [4, 5, 6]
