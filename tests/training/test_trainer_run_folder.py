"""Several runs in one folder: at the same time, or one after the other."""

import os
import re
from functools import partial

import pytest
import torch
from child_processes import exit_code, fork
from tiny_runs import (
    CONFIG,
    RaiseAt,
    StopAt,
    checkpoint_tensors,
    equal,
    make_trainer,
    saved_steps,
)

from homebrew import load_model
from homebrew.callbacks.base import Callback
from homebrew.errors import ConfigError


class CallAt(Callback):
    """Calls a function at the end of the second step, and keeps the message of its ConfigError."""

    def __init__(self, function):
        self.function, self.message = function, None

    def on_step_end(self, trainer):
        if trainer.step == 2:
            with pytest.raises(ConfigError) as caught:
                self.function()
            self.message = str(caught.value)


# --- one after the other


def test_the_error_for_a_folder_with_a_run_names_the_ways_on(tmp_path):
    make_trainer(tmp_path, max_steps=1).train()
    with pytest.raises(ConfigError, match=r"(?s)already holds a run.*resume=True.*overwrite=True.*another output_dir"):
        make_trainer(tmp_path, max_steps=1).train()


@pytest.mark.usefixtures("deterministic")
def test_a_cell_that_is_run_again_keeps_the_earlier_runs(tmp_path):
    for steps in (2, 3, 4):
        trainer = make_trainer(tmp_path / "run", max_steps=steps)
        trainer.train(overwrite=True)
        assert trainer.step == steps
    assert saved_steps(tmp_path / "run") == [4]
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("begin") == 1
    for number, steps in ((1, 2), (2, 3)):
        old = tmp_path / "run" / f"old-{number}"
        assert saved_steps(old) == [steps]
        assert load_model(old)[0].config == CONFIG
    make_trainer(tmp_path / "fresh", max_steps=4).train()
    assert equal(checkpoint_tensors(tmp_path / "run", 4), checkpoint_tensors(tmp_path / "fresh", 4))


def test_an_earlier_run_that_was_moved_aside_can_be_resumed(tmp_path):
    make_trainer(tmp_path, callbacks=[StopAt(2)]).train()
    make_trainer(tmp_path, max_steps=1).train(overwrite=True)
    resumed = make_trainer(tmp_path / "old-1")
    resumed.train(resume=True)
    assert saved_steps(tmp_path / "old-1") == [2, 6]


def test_overwrite_in_a_new_folder_is_a_plain_run(tmp_path):
    make_trainer(tmp_path / "run", max_steps=1).train(overwrite=True)
    assert not list(tmp_path.rglob("old*"))


@pytest.mark.parametrize("resume", [True, "checkpoint"])
def test_overwrite_and_resume_contradict_each_other(tmp_path, resume):
    make_trainer(tmp_path, max_steps=1).train()
    with pytest.raises(ConfigError, match=r"overwrite=True.*resume="):
        make_trainer(tmp_path, max_steps=1).train(resume=resume, overwrite=True)
    assert saved_steps(tmp_path) == [1]


def test_a_finished_run_that_is_started_again_removes_what_a_kill_has_left(tmp_path):
    make_trainer(tmp_path, save_every=1, keep_last=3).train()
    (tmp_path / "checkpoints" / ".step-00000003.removing").mkdir()
    (tmp_path / ".run.json.0123abcd").touch()
    make_trainer(tmp_path, keep_last=1).train(resume=True)
    assert [path.name for path in tmp_path.rglob(".*")] == []
    assert saved_steps(tmp_path) == [6]


# --- at the same time


@pytest.mark.parametrize("use", ["train", "resume", "overwrite", "save"])
def test_a_folder_in_use_is_refused(tmp_path, use):
    other = make_trainer(tmp_path)
    uses = {
        "train": other.train,
        "resume": lambda: other.train(resume=True),
        "overwrite": lambda: other.train(overwrite=True),
        "save": other.save,
    }
    intruder = CallAt(uses[use])
    make_trainer(tmp_path, callbacks=[intruder]).train()
    assert f"process {os.getpid()} on host" in intruder.message
    assert saved_steps(tmp_path) == [6]


@pytest.mark.parametrize("error", [None, ValueError("from a callback"), KeyboardInterrupt()])
def test_the_folder_is_free_once_train_has_returned_or_raised(tmp_path, error):
    first = make_trainer(tmp_path, callbacks=[RaiseAt(3, error)] if error else [], save_every=2)
    if error is None:
        first.train()
    else:
        with pytest.raises(type(error)):
            first.train()
    second = make_trainer(tmp_path)
    second.train(resume=True)
    assert second.step == 6
    first.save()  # the first Trainer still exists, as in a notebook


def test_a_start_that_failed_leaves_the_folder_free(tmp_path):
    make_trainer(tmp_path, max_steps=1).train()
    refused = make_trainer(tmp_path, max_steps=1)
    with pytest.raises(ConfigError, match="already holds a run"):
        refused.train()
    make_trainer(tmp_path, max_steps=1).train(resume=True)


def test_a_callback_can_save_and_a_dataset_can_fork_during_the_run(tmp_path):
    class Saves(Callback):
        def on_train_begin(self, trainer):
            trainer.save()

        def on_step_end(self, trainer):
            trainer.save()

    make_trainer(tmp_path, callbacks=[Saves()], num_workers=1, keep_last=9).train()
    assert saved_steps(tmp_path) == list(range(7))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a forked process cannot use the GPU")
def test_of_runs_started_at_once_one_trains_and_the_others_say_which(tmp_path):
    start, let_start = os.pipe()

    def train(number):
        result = tmp_path / str(number)
        try:
            trainer = make_trainer(tmp_path / "run", max_steps=4, save_every=1, progress=False)
            os.close(let_start)
            os.read(start, 1)  # until the parent closes its end
            trainer.train()
            result.write_text("done")
        except ConfigError as error:
            result.write_text(str(error))

    children = [fork(partial(train, number)) for number in range(5)]
    os.close(start)
    os.close(let_start)
    assert [exit_code(pid) for pid in children] == [0] * 5
    results = [(tmp_path / str(number)).read_text() for number in range(5)]
    assert results.count("done") == 1, results
    holders = "|".join(map(str, children))  # a loser holds the lock too, until it finds the winner's run
    for result in results:
        assert result == "done" or re.search(rf"process ({holders}) on host|already holds a run", result), results
    assert saved_steps(tmp_path / "run") == [3, 4]
