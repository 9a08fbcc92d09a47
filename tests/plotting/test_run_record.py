import json
import os

import numpy as np
import pytest

from homebrew.errors import DataError
from homebrew.metrics.step_metrics import TextSample
from homebrew.plotting.run_record import find_runs, read_run


def test_a_killed_and_resumed_run_has_each_step_once(killed_and_resumed):
    events = [json.loads(line) for line in (killed_and_resumed / "metrics.jsonl").read_text().splitlines()]
    logged = [event["step"] for event in events if event["event"] == "step"]
    assert len(logged) > len(set(logged))
    run = read_run(killed_and_resumed)
    assert run.steps["step"].tolist() == [1, 2, 3, 4, 5, 6]
    assert run.evaluations["step"].tolist() == [2, 4, 6]
    assert run.resumes["step"].tolist() == [2]
    assert run.settings["config/max_steps"] == 6
    assert (np.diff(run.steps["elapsed_seconds"]) > 0).all()


def begin(step):
    return {"event": "resume" if step else "begin", "step": step}


def test_seconds_continue_after_a_resume(record):
    run = read_run(record("a", [begin(0), 1, 2, 3, 4, begin(2), {"event": "step", "step": 3, "elapsed_seconds": 1.5}]))
    assert run.steps["elapsed_seconds"].tolist() == [2.0, 4.0, 5.5]


@pytest.mark.parametrize(
    ("events", "steps"),
    [
        ([begin(0), 1, 2, 3, begin(0), 1, 2], [1, 2]),
        ([begin(0), 1, 2, 3, begin(2)], [1, 2]),
        ([begin(0), 1, 2, 3, 4, begin(3), 4, 5, begin(2), 3], [1, 2, 3]),
        ([1, 2, 3, 2], [1, 2]),  # the "resume" was lost on a full disk
        (
            [{"event": "step", "step": True}, 2, {"event": "step", "step": -1}, {"event": "step", "step": 10**400}],
            [1, 2],
        ),
    ],
)
def test_steps_taken_again_replace_earlier_ones(record, events, steps):
    assert read_run(record("a", events)).steps["step"].tolist() == steps


def test_marks_of_discarded_steps_are_discarded(record):
    skipped = [{"event": "step_skipped", "step": step, "loss": None} for step in (2, 4)]
    run = read_run(record("a", [1, *skipped, begin(4), 5, begin(3), 6]))
    assert run.skipped["step"].tolist() == [2]
    assert run.resumes["step"].tolist() == [3]


@pytest.mark.parametrize("loss", [None, "2.0", [2.0], 10**400])
def test_values_that_are_not_numbers_are_nan(record, loss):
    event = {"event": "step", "step": 2, "loss": loss}
    assert np.isnan(read_run(record("a", [1, event])).steps["loss"]).tolist() == [False, True]


def test_an_incomplete_last_line_is_ignored(record):
    folder = record("a", [1, 2])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"event": "step", "step": 3, "lo')
    assert read_run(folder).steps["step"].tolist() == [1, 2]


def test_evaluations_have_a_position_on_every_axis(record):
    run = read_run(record("a", [1, 3, {"event": "evaluate", "step": 2, "loss": 1.0}]))
    for x, position in (("steps", 2), ("tokens", 16), ("seconds", 4)):
        assert run.positions(x, run.evaluations["step"]) == [position]


def test_samples_discarded_by_a_resume_are_not_read(record):
    folder = record("a")
    samples = [{"event": "sample", "step": step, "prompt": "a", "text": f"ab{step}"} for step in (2, 4)]
    events = [begin(0), *samples, begin(3), {"event": "sample", "step": 6, "prompt": "", "text": "c"}]
    (folder / "samples.jsonl").write_text("".join(json.dumps(event) + "\n" for event in [*events, {"event": "x"}]))
    assert read_run(folder).samples == [TextSample(2, "a", "ab2"), TextSample(6, "", "c")]


def test_a_folder_of_runs_stands_for_the_runs_in_it(record, tmp_path):
    runs = [record("runs/b"), record("runs/a")]
    (tmp_path / "runs" / "notes").mkdir()
    assert find_runs([tmp_path / "runs"]) == runs[::-1]
    assert find_runs([runs[0], tmp_path / "runs"]) == runs


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("rums/a", "There is no folder"),
        ("runs/a/metrics.jsonl", "is a file"),
        ("empty", "no metrics.jsonl"),
    ],
)
def test_what_is_no_run_is_an_error(record, tmp_path, path, message):
    record("runs/a")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=message):
        find_runs([tmp_path / path])


@pytest.mark.parametrize("events", [[], [begin(0)], [{"event": "evaluate", "step": 1, "loss": 1.0}]])
def test_a_run_without_logged_steps_is_an_error(record, events):
    with pytest.raises(DataError, match="no logged steps"):
        read_run(record("a", events))


@pytest.mark.parametrize("name", ["metrics.jsonl", "run.json", "samples.jsonl"])
@pytest.mark.parametrize("kind", ["link", "folder", "pipe"])
def test_only_regular_files_of_a_run_are_read(record, tmp_path, name, kind):
    file = record("a") / name
    file.unlink(missing_ok=True)
    {
        "link": lambda: file.symlink_to(tmp_path / "elsewhere"),
        "folder": file.mkdir,
        "pipe": lambda: os.mkfifo(file),
    }[kind]()
    with pytest.raises(DataError, match=name):
        read_run(file.parent)


def test_settings_are_optional_but_must_be_valid(record):
    folder = record("a")
    (folder / "run.json").write_text("{")
    with pytest.raises(DataError, match=r"run\.json"):
        read_run(folder)
    (folder / "run.json").unlink()
    assert read_run(folder).settings == {}
