"""CheckpointManager in one process, without a Trainer."""

import threading
from unittest.mock import Mock

import pytest
import torch
from accelerate import Accelerator

from homebrew import GPT, GPTConfig
from homebrew.checkpoint import manager as manager_module
from homebrew.checkpoint.compatibility import ASPECTS
from homebrew.checkpoint.manager import CheckpointManager
from homebrew.checkpoint.manifest import open_checkpoint
from homebrew.checkpoint.state_dict import RunState
from homebrew.checkpoint.store import CheckpointStore
from homebrew.errors import CheckpointError, ConfigError
from homebrew.training.nan_guard import NanGuard


@pytest.fixture
def build(tmp_path):
    """Build a manager of a new model for the same run."""

    def build():
        model = GPT(GPTConfig(block_size=8, vocab_size=50, n_layer=1, n_head=1, n_embd=8))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        guard = NanGuard(optimizer, "raise", 10, torch.device("cpu"))
        return CheckpointManager(
            RunState(Accelerator(cpu=True), model, optimizer, guard),
            CheckpointStore(tmp_path),
            gather_limit_bytes=0,  # has no effect without FSDP
            seed=1,
            identity=lambda num_steps: dict.fromkeys(ASPECTS, 1),
            max_steps=9,
            tokenizer=None,
        )

    return build


def test_saves_and_restores_a_step(build):
    manager = build()
    assert manager.restore(False, ()) == (0, 0)
    with manager:
        manager.save(3, 24, eval_loss=1.5)
        manager.wait()
    assert open_checkpoint(manager.path(3)).manifest.score == 1.5
    assert not manager.is_saved(4)
    other = build()
    assert other.restore(True, ()) == (3, 24)
    assert other.is_saved(3)


@pytest.mark.parametrize("wait", ["wait", "finish"])
def test_a_write_error_is_raised_once_and_the_step_is_not_saved(build, monkeypatch, wait):
    def fail(*_args, **_kwargs):
        raise CheckpointError("no space")

    manager = build()
    manager.restore(False, ())
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointStore, "save", fail)
        manager.save(3, 24)
        with pytest.raises(CheckpointError, match="no space"):
            getattr(manager, wait)()
    assert not manager.failed
    assert not manager.is_saved(3)
    manager.save(3, 24)
    manager.finish()
    assert open_checkpoint(manager.path(3)).step == 3


@pytest.mark.parametrize("error", [KeyError("dtype"), MemoryError()])
def test_any_write_error_is_a_checkpoint_error(build, monkeypatch, error):
    """Other errors would be raised on rank 0 only, while the other ranks wait in a collective."""
    manager = build()
    manager.restore(False, ())
    monkeypatch.setattr(CheckpointStore, "save", Mock(side_effect=error))
    manager.save(3, 24)
    with pytest.raises(CheckpointError, match="could not be written") as raised:
        manager.wait()
    assert raised.value.__cause__ is error
    assert not manager.is_saved(3)


def test_the_folder_stays_locked_while_a_write_runs_whose_waits_were_interrupted(build, monkeypatch, tmp_path):
    first, second, proceed = build(), build(), threading.Event()
    monkeypatch.setattr(CheckpointStore, "save", lambda *_args, **_kwargs: proceed.wait(10))

    def run():
        with first.locked():
            first.restore(False)
            first.save(3, 24)
            monkeypatch.setattr(first._writer, "close", Mock(side_effect=KeyboardInterrupt))

    with pytest.raises(KeyboardInterrupt):
        run()
    with pytest.raises(ConfigError, match="is in use"), second.locked():
        pass
    monkeypatch.undo()
    proceed.set()
    with first.locked():  # as in the next call of train() or save()
        assert not first._writer.is_writing(0)
    with second.locked():
        pass


def test_ranks_poll_while_a_checkpoint_is_written(build, monkeypatch):
    proceed, answers = threading.Event(), []

    def run_on_main(_accelerator, work):  # a collective of all ranks
        answers.append(work())
        if len(answers) == 3:
            proceed.set()
        return answers[-1]

    manager = build()
    manager.restore(False, ())
    monkeypatch.setattr(CheckpointStore, "save", lambda *_args, **_kwargs: proceed.wait(10))
    manager.save(3, 24)
    monkeypatch.setattr(manager_module, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(manager_module, "run_on_main", run_on_main)
    manager.wait()
    assert answers[:3] == [True] * 3
    assert answers[-1] is False
