"""What the trackers of Accelerate hold after a run, read from what they have stored."""

import contextlib
import json
import re
import shutil
import sqlite3
from functools import partial
from pathlib import Path

import pytest
from accelerate.tracking import GeneralTracker
from tiny_runs import RaiseAt, make_trainer
from wandb_files import read_offline_runs

from homebrew import GPTConfig, SampleText, TokenDataset
from homebrew.callbacks.trackers import log_samples
from homebrew.errors import ConfigError
from homebrew.metrics.step_metrics import TextSample

TEXT = "To be, or not to be: that is the question.\n" * 40
DATASET = TokenDataset.from_text(TEXT, block_size=16, tokenizer="char")
MODEL = GPTConfig(block_size=16, vocab_size=DATASET.vocab_size, n_layer=1, n_head=1, n_embd=16)

TRAIN = {
    "train/loss",
    "train/learning_rate",
    "train/grad_norm",
    "train/tokens_per_second",
    "train/num_tokens",
    "train/elapsed_seconds",
}
EVAL = {"eval/loss", "eval/perplexity", "eval/bits_per_byte", "eval/num_tokens"}
SETTINGS = {"config/max_steps": 6, "optimizer/class": "AdamW", "optimizer/groups/0/lr": 0.01, "model/n_embd": 16}


@pytest.fixture(autouse=True)
def store_in_tmp_path(tmp_path, monkeypatch):
    """Keep the trackers in the test's folder and off the network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    for name in ("PROJECT", "NAME", "RUN_ID", "RESUME"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)


def run(tracker, folder="runs/first", *, callbacks=(), resume=False, **options):
    """Train for six steps, with evaluations and samples after the third and the last."""
    samples = SampleText(every=3, prompts=["To be", "or"], max_new_tokens=4)
    config = {"log_with": tracker, "eval_every": 3, "save_every": 3}
    trainer = make_trainer(
        folder,
        model=MODEL,
        train_dataset=DATASET,
        eval_dataset=DATASET,
        callbacks=[samples, *callbacks],
        **config | options,
    )
    trainer.train(resume=resume)
    return read_run_json(folder)


def read_run_json(folder):
    return json.loads((Path(folder) / "run.json").read_text())


def interrupted(tracker):
    """Train until the fifth step, so that the run resumes from the third."""
    with pytest.raises(KeyboardInterrupt):
        run(tracker, callbacks=[RaiseAt(5, KeyboardInterrupt())])


def read_tensorboard(folder="runs/first"):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(f"{folder}/logs/homebrew").Reload()


def use_trackio(folder, monkeypatch):
    """Let trackio store its database in a folder."""
    pytest.importorskip("trackio")
    from trackio import context_vars, sqlite_storage, utils

    for module in (utils, sqlite_storage):
        monkeypatch.setattr(module, "TRACKIO_DIR", folder)
    context_vars.current_project.set(None)


def read_trackio(folder, project="homebrew"):
    """Return the logged rows and the settings in trackio's database."""
    with contextlib.closing(sqlite3.connect(folder / f"{project}.db")) as database:
        rows = database.execute("select run_name, run_id, step, metrics from metrics order by id").fetchall()
        settings = database.execute("select run_name, config from configs").fetchall()
    return [(*row[:3], json.loads(row[3])) for row in rows], {name: json.loads(text) for name, text in settings}


def test_tensorboard_has_metrics_settings_and_samples():
    run("tensorboard")
    events = read_tensorboard()
    tags = events.Tags()
    assert set(tags["scalars"]) >= TRAIN | EVAL
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in events.Scalars("eval/loss")] == [3, 6]
    assert set(tags["tensors"]) == {"samples/0/text_summary", "samples/1/text_summary"}
    texts = events.Tensors("samples/1/text_summary")
    assert [text.step for text in texts] == [3, 6]
    assert texts[0].tensor_proto.string_val[0].startswith(b"    or")


def test_tensorboard_shows_each_step_of_a_resumed_run_once():
    interrupted("tensorboard")
    run("tensorboard", resume=True)
    events = read_tensorboard()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in events.Scalars("eval/loss")] == [3, 6]
    assert [event.step for event in events.Tensors("samples/0/text_summary")] == [3, 6]


def test_wandb_has_metrics_settings_and_samples(tmp_path):
    pytest.importorskip("wandb").teardown()  # otherwise it stays in the folder of an earlier test
    run_id = run("wandb")["run_id"]
    (stored,) = read_offline_runs(tmp_path)
    assert (stored["project"], stored["name"], stored["id"]) == ("homebrew", "first", run_id)
    assert stored["settings"].items() >= SETTINGS.items()
    assert "None" not in stored["settings"].values()  # which would make a column of numbers one of texts
    rows = {row["_step"]: row for row in stored["rows"]}
    assert list(rows) == [1, 2, 3, 4, 5, 6]
    assert all(rows[step].keys() >= TRAIN for step in rows)
    assert all(rows[step].keys() >= EVAL | {"samples/0/path", "samples/1/path"} for step in (3, 6))
    (page,) = tmp_path.glob(f"wandb/offline-run-*/files/{rows[3]['samples/1/path']}")
    assert ">or" in page.read_text()


def test_wandb_continues_a_resumed_run(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    stored = []
    for folder, train in {"a": interrupted, "b": partial(run, resume=True)}.items():
        wandb.teardown()
        monkeypatch.setenv("WANDB_DIR", str(tmp_path / folder))  # in one folder, two runs would need two seconds
        (tmp_path / folder).mkdir()
        train("wandb")
        stored += read_offline_runs(tmp_path / folder)
    assert [run["id"] for run in stored] == [read_run_json("runs/first")["run_id"]] * 2
    assert [run["rows"][-1]["_step"] for run in stored] == [4, 6]


def test_the_variables_of_wandb_are_used(tmp_path, monkeypatch):
    pytest.importorskip("wandb").teardown()
    for name, value in {"PROJECT": "tests", "NAME": "baseline", "RUN_ID": "id-1"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    run("wandb")
    (stored,) = read_offline_runs(tmp_path)
    assert (stored["project"], stored["name"], stored["id"]) == ("tests", "baseline", "id-1")


def test_trackio_has_metrics_settings_and_samples(tmp_path, monkeypatch):
    use_trackio(tmp_path, monkeypatch)
    name = f"first-{run('trackio')['run_id']}"
    rows, settings = read_trackio(tmp_path)
    assert settings[name].items() >= SETTINGS.items()
    assert "None" not in settings[name].values()
    assert {row[0] for row in rows} == {name}
    for names, steps in ((TRAIN, [1, 2, 3, 4, 5, 6]), (EVAL, [3, 6]), ({"samples/0", "samples/1"}, [3, 6])):
        assert [step for _, _, step, values in rows if values.keys() >= names] == steps
    assert next(values["samples/1"]["_value"] for *_, values in rows if "samples/1" in values).startswith("    or")


def test_trackio_continues_a_resumed_run(tmp_path, monkeypatch):
    use_trackio(tmp_path, monkeypatch)
    interrupted("trackio")
    run("trackio", resume=True)
    rows, _ = read_trackio(tmp_path)
    assert len({row[:2] for row in rows}) == 1
    assert {step for _, _, step, values in rows if values.keys() >= TRAIN} == {1, 2, 3, 4, 5, 6}


def test_a_copied_run_is_another_run():
    interrupted(None)
    shutil.copytree("runs/first", "runs/copy")
    assert run(None, "runs/copy", resume=True)["run_id"] != run(None, resume=True)["run_id"]


@pytest.mark.parametrize("spelling", ["linked/first", "runs/../runs/first"])
def test_a_run_resumed_by_another_path_of_its_folder_is_the_same(spelling):
    interrupted(None)
    Path("linked").symlink_to("runs")
    run_id = read_run_json("runs/first")["run_id"]
    assert run(None, spelling, resume=True)["run_id"] == run_id


def test_a_run_that_starts_over_is_another_run():
    ids = [run(None, max_steps=1)["run_id"], run(None, "runs/second", max_steps=1)["run_id"]]
    make_trainer("runs/first", model=MODEL, train_dataset=DATASET).train(overwrite=True)
    ids.append(read_run_json("runs/first")["run_id"])
    assert len(set(ids)) == 3


@pytest.mark.parametrize("contents", ["not JSON", '{"run_id": 7}', '{"run_id": "../../x"}', "{}", "[]"])
def test_a_resumed_run_whose_id_is_not_valid_gets_another(contents):
    interrupted(None)
    Path("runs/first/run.json").write_text(contents)
    assert re.fullmatch("[0-9a-f]{8}", run(None, resume=True)["run_id"])


def test_other_trackers_get_no_texts():
    class Tracker(GeneralTracker):
        name, requires_logging_directory = "custom", False
        tracker = None

        def log(self, values, step=None, **_):
            raise AssertionError(values)

    log_samples([Tracker()], [TextSample(1, "", "a")], step=1)


def test_wandb_without_a_login_is_an_error_that_says_what_to_do(tmp_path, monkeypatch):
    pytest.importorskip("wandb").teardown()
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("HOME", str(tmp_path))  # without .netrc
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"wandb could not be started.*wandb login"):
        run("wandb")


def test_a_tracker_that_cannot_be_started_is_an_error_that_names_its_file():
    Path("runs/first").mkdir(parents=True)
    Path("runs/first/logs").touch()
    with pytest.raises(ConfigError, match=r"tensorboard could not be started.*runs/first/logs"):
        run("tensorboard")
