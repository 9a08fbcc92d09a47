import math
import sys

import pytest
from tiny_runs import RaiseAt, StopAt, make_trainer, token_dataset

from homebrew import CurvePlot
from homebrew.errors import ConfigError


def picture(folder):
    path = folder / "curves.png"
    return path.read_bytes() if path.exists() else None


def train(folder, min_seconds=0.0, callbacks=(), resume=False, **config):
    make_trainer(folder, callbacks=[CurvePlot(min_seconds), *callbacks], progress=False, **config).train(resume=resume)


def test_a_picture_is_written_at_the_end(tmp_path):
    train(tmp_path)
    assert picture(tmp_path).startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".*png*"))


def test_a_run_that_a_callback_stops_has_a_picture(tmp_path):
    train(tmp_path, callbacks=[StopAt(2)])
    assert picture(tmp_path)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("custom"), SystemExit(143)])
def test_a_run_that_is_interrupted_ends_without_delay(tmp_path, error):
    with pytest.raises(type(error)):
        train(tmp_path, callbacks=[RaiseAt(3, error)])
    assert picture(tmp_path) is None


def test_a_short_run_has_no_picture_but_an_existing_one_is_updated(tmp_path):
    make_trainer(tmp_path).train()
    assert picture(tmp_path) is None
    (tmp_path / "curves.png").write_bytes(b"old")
    make_trainer(tmp_path, max_steps=8).train(resume=True, accept_changes=["schedule"])
    assert picture(tmp_path).startswith(b"\x89PNG")


def test_resuming_a_finished_run_draws_nothing(tmp_path):
    train(tmp_path, min_seconds=math.inf)
    train(tmp_path, resume=True)
    assert picture(tmp_path) is None


def test_a_resumed_run_that_only_evaluates_has_a_new_picture(tmp_path):
    train(tmp_path)
    before = picture(tmp_path)
    train(tmp_path, resume=True, eval_dataset=token_dataset())
    assert picture(tmp_path) != before


def test_without_matplotlib_nothing_is_written_or_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    train(tmp_path)
    assert picture(tmp_path) is None


def test_a_picture_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("a broken font")

    monkeypatch.setattr("homebrew.plotting.curves.curves_image", fail)
    with pytest.warns(UserWarning, match=r"curves\.png could not be written: a broken font"):
        train(tmp_path / "a")
    (tmp_path / "b" / "curves.png").mkdir(parents=True)
    with pytest.warns(UserWarning, match=r"curves\.png could not be written"):
        train(tmp_path / "b")


def test_an_error_of_an_earlier_callback_at_the_start_is_the_only_one(tmp_path):
    (tmp_path / "run.json").mkdir()
    with pytest.raises(ConfigError, match=r"run\.json"):  # a warning is an error, too
        train(tmp_path)


def test_only_the_main_process_draws(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, callbacks=[CurvePlot(0.0)], progress=False)
    monkeypatch.setattr(type(trainer), "is_main_process", False)
    trainer.train()
    assert picture(tmp_path) is None
