import json

import pytest

from homebrew.plotting.run_labels import run_labels
from homebrew.plotting.run_record import read_run


def labels(*folders):
    return run_labels([read_run(folder) for folder in folders])


def test_runs_are_told_apart_by_the_settings_that_differ(record):
    a = record("a", optimizer="adamw", learning_rate=6e-4, seed=1)
    b = record("b", optimizer="muon", learning_rate=6e-4, seed=1)
    assert labels(a, b) == ["a: optimizer=adamw", "b: optimizer=muon"]


def test_a_custom_optimizer_is_named(record):
    folders = record("a", optimizer="adamw"), record("b", optimizer="adamw")
    for folder, name in zip(folders, ("AdamW", "SGD"), strict=True):
        settings = json.loads((folder / "run.json").read_text()) | {"optimizer": {"class": name, "groups": [name]}}
        (folder / "run.json").write_text(json.dumps(settings))
    assert labels(*folders) == ["a: optimizer=AdamW", "b: optimizer=SGD"]


def test_settings_that_change_nothing_are_not_named(record):
    a, b = record("a", log_every=1, save_every=5, seed=1), record("b", log_every=2, save_every=7, seed=2)
    assert labels(a, b) == ["a: seed=1", "b: seed=2"]


@pytest.mark.parametrize("without", [{}, {"ema_decay": None}])
def test_a_setting_of_only_one_run_is_named_where_it_is(record, without):
    assert labels(record("a", **without), record("b", ema_decay=0.9)) == ["a", "b: ema_decay=0.9"]


def test_runs_with_equal_settings_are_told_apart_by_their_folders(record):
    assert labels(record("a"), record("b")) == ["a", "b"]
    x, y = record("x/run"), record("y/run")
    assert labels(x, y) == labels(x, x / "../../y/run") == ["x/run", "y/run"]
    assert labels(x, record("x/run/run")) == ["run", "run/run"]


def test_a_run_without_settings_has_its_name(record):
    folder = record("a")
    (folder / "run.json").unlink()
    assert labels(folder, record("b", seed=1), record("c", seed=2)) == ["a", "b: seed=1", "c: seed=2"]


def test_a_label_stays_short(record):
    many = [record(name, **{f"setting_{i}": name * 100 for i in range(20)}) for name in ("a", "b")]
    assert all(len(label) <= 120 for label in labels(*many))
    assert len(labels(record("n" * 250))[0]) <= 120


@pytest.mark.parametrize("name", ["two\nlines", "bell\a", "\udcff", "\ufffe"])
def test_a_label_is_one_line_without_characters_that_xml_lacks(record, name):
    (label,) = labels(record(name))
    assert label.isprintable()
