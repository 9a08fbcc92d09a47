"""Warnings show the line of the user's code that called homebrew."""

import errno
import linecache
import textwrap

import pytest
from tiny_runs import checkpoint_path, make_trainer

from homebrew import GPT, GPTConfig, load_model
from homebrew.callbacks.base import Callback
from homebrew.errors import CheckpointError
from homebrew.hub.tokenizer_files import HOMEBREW_FILE
from homebrew.metrics.metrics_log import MetricsLog
from homebrew.user_warnings import warn


class Fails(Callback):
    """Raises an error in a method."""

    def __init__(self, method, error):
        setattr(self, method, self.fail)
        self.error = error

    def fail(self, *_):
        raise self.error


def line_of(warned):
    """Return the line of source code that a warning shows."""
    (warning,) = warned
    assert warning.filename == __file__
    return linecache.getline(warning.filename, warning.lineno).strip()


def test_a_failing_on_train_end_shows_the_call_of_train(tmp_path):
    callbacks = [Fails("on_step_end", ValueError("first")), Fails("on_train_end", ValueError("second"))]
    trainer = make_trainer(tmp_path, callbacks=callbacks)
    with pytest.warns(UserWarning, match="second") as warned, pytest.raises(ValueError, match="first"):
        trainer.train()
    assert line_of(warned) == "trainer.train()"


def test_a_step_that_could_not_be_saved_shows_the_call_of_train(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, max_steps=1, callbacks=[Fails("on_evaluate", ValueError("from a callback"))])
    trainer.eval_dataset = trainer.train_dataset
    monkeypatch.setattr(trainer, "save", Fails("save", CheckpointError("disk full")).save)
    with pytest.warns(UserWarning, match="disk full") as warned, pytest.raises(ValueError, match="from a callback"):
        trainer.train()
    assert line_of(warned) == "trainer.train()"


def test_a_full_disk_shows_the_call_of_train(tmp_path, monkeypatch):
    monkeypatch.setattr(MetricsLog, "_append", Fails("append", OSError(errno.ENOSPC, "No space left")).append)
    trainer = make_trainer(tmp_path, max_steps=1)
    with pytest.warns(UserWarning, match="Free some space") as warned:
        trainer.train()
    assert line_of(warned) == "trainer.train()"


def test_a_full_disk_while_a_callback_saves_shows_the_callback(tmp_path, monkeypatch):
    class Saves(Callback):
        def on_step_end(self, trainer):
            monkeypatch.setattr(MetricsLog, "_append", Fails("append", OSError(errno.EIO, "I/O error")).append)
            trainer.save()

    trainer = make_trainer(tmp_path, max_steps=1, callbacks=[Saves()])
    with pytest.warns(UserWarning, match="I/O error") as warned:
        trainer.train()
    assert line_of(warned) == "trainer.save()"


@pytest.mark.parametrize("kind", ["run", "export"])
def test_a_custom_tokenizer_shows_the_call_of_load_model(tmp_path, kind):
    model = GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=1, n_head=1, n_embd=8))
    if kind == "export":
        model.save_pretrained(tmp_path)
        (tmp_path / HOMEBREW_FILE).write_text('{"name": "custom"}')
    else:
        trainer = make_trainer(tmp_path, model=model)
        trainer._checkpoints._tokenizer = {"name": "custom"}
        trainer.save()
    with pytest.warns(UserWarning, match="custom tokenizer") as warned:
        load_model(tmp_path)
    assert line_of(warned) == "load_model(tmp_path)"


def test_settings_that_a_model_loses_show_the_call_of_load_model(tmp_path):
    GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=1, n_head=1, n_embd=8)).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.5}')
    with pytest.warns(UserWarning, match="temperature") as warned:
        load_model(tmp_path)
    assert line_of(warned) == "load_model(tmp_path)"


def test_an_invalid_checkpoint_shows_the_call_that_skips_it(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=4, save_every=2)
    trainer.train()
    (checkpoint_path(tmp_path, 4) / "manifest.json").write_text("{")
    with pytest.warns(UserWarning, match="Skipped an invalid checkpoint") as warned:
        load_model(tmp_path)
    assert line_of(warned) == "load_model(tmp_path)"
    with pytest.warns(UserWarning, match="Ignored an invalid checkpoint") as warned:
        trainer.train(resume=True)
    assert line_of(warned) == "trainer.train(resume=True)"


PACKAGE = """
    import contextlib

    @contextlib.contextmanager
    def block(warn):
        warn("shown")
        yield

    def enter_block(warn):
        with block(warn):
            pass
"""


def test_frames_of_the_package_and_of_its_context_managers_are_skipped():
    package = {"__name__": "homebrew.example"}
    exec(textwrap.dedent(PACKAGE), package)
    with pytest.warns(UserWarning, match="shown") as warned:
        package["enter_block"](warn)
    assert line_of(warned) == 'package["enter_block"](warn)'
