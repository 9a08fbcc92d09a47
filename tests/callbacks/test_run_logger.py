"""What a run leaves to read."""

import json
import resource
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from torch.utils.data import Dataset

from homebrew import GPTConfig, TokenDataset, Trainer, TrainerConfig
from homebrew.callbacks.base import Callback
from homebrew.callbacks.run_logger import RunLogger
from homebrew.errors import ConfigError

SHAPE = GPTConfig(block_size=8, vocab_size=32, n_layer=1, n_head=1, n_embd=8)


def dataset():
    return TokenDataset.from_tokens(torch.arange(32).repeat(4), 8, vocab_size=32)


def make(folder, *, train=None, accelerator=None, callbacks=(), **settings):
    settings = {"max_steps": 1, "micro_batch_size": 2, "mixed_precision": "no"} | settings
    config = TrainerConfig(output_dir=folder, **settings)
    return Trainer(SHAPE, train or dataset(), config=config, accelerator=accelerator, callbacks=callbacks)


class Tracker(GeneralTracker):
    """Remembers what it is told."""

    name, requires_logging_directory = "mine", False

    def __init__(self):
        super().__init__()
        self.told = []

    @property
    def tracker(self):
        return self.told

    def start(self):
        self.told.append("start")

    def log(self, values, step=None, **_):
        self.told.append(step)

    def finish(self):
        self.told.append("finish")


def test_each_run_on_an_accelerator_starts_and_finishes_its_trackers_once(tmp_path):
    tracker = Tracker()
    accelerator = Accelerator(cpu=True, log_with=tracker)
    for run in ("first", "second"):
        make(tmp_path / run, accelerator=accelerator).train()
        assert tracker.told == ["start", 1, "finish"]
        tracker.told.clear()


def test_trackers_that_are_running_get_the_figures_and_go_on(tmp_path):
    tracker = Tracker()
    accelerator = Accelerator(cpu=True, log_with=tracker)
    accelerator.init_trackers("mine")
    make(tmp_path, accelerator=accelerator).train()
    accelerator.end_training()
    assert tracker.told == ["start", 1, "finish"]


def test_a_tracker_that_does_not_start_is_not_taken_to_run(tmp_path):
    class Offline(Tracker):
        def start(self):
            super().start()
            if self.told == ["start"]:
                raise OSError("no network")

    tracker = Offline()
    accelerator = Accelerator(cpu=True, log_with=tracker)
    with pytest.raises(OSError, match="no network"):
        make(tmp_path, accelerator=accelerator).train()
    make(tmp_path, accelerator=accelerator).train()
    assert tracker.told == ["start", "start", 1, "finish"]


class Wrapped(Dataset):
    """A dataset of one's own, with attributes of its own."""

    def __init__(self, **attributes):
        self.samples = dataset()
        vars(self).update(attributes)

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        return self.samples[i]


class OtherTokenizer:
    """As other libraries make them."""

    name_or_path, vocab_size, eos_token_id = "gpt2", 32, 0

    def encode(self, text):
        return [0]

    def decode(self, ids):
        return ""


def test_a_dataset_may_have_another_librarys_tokenizer(tmp_path):
    trainer = make(tmp_path, train=Wrapped(tokenizer=OtherTokenizer()))
    trainer.train()
    assert "tokenizer" not in json.loads((tmp_path / "run.json").read_text())["train_dataset"]
    with pytest.raises(ConfigError, match="needs a tokenizer of ours"):
        trainer.sample()


def test_facts_that_json_has_not_are_written_as_text(tmp_path):
    make(tmp_path, train=Wrapped(source=Path("some/text"))).train()
    assert json.loads((tmp_path / "run.json").read_text())["train_dataset"]["source"] == "some/text"


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl"])
def test_a_folder_that_takes_no_record_is_told_before_the_first_step(tmp_path, name):
    (tmp_path / name).mkdir()
    trainer = make(tmp_path)
    with pytest.raises(ConfigError, match=rf"output_dir=.* cannot take .*Is a directory.*{name}"):
        trainer.train()
    assert trainer.step == 0


def test_facts_that_do_not_fit_leave_those_from_before(tmp_path):
    trainer = make(tmp_path)
    trainer.train()
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.*")}
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, usual[1]))
    try:
        with pytest.raises(ConfigError, match="File too large"):
            RunLogger().on_train_begin(trainer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert {path.name: path.read_bytes() for path in [*tmp_path.glob("*.*"), *tmp_path.glob(".*")]} == before


def test_an_error_as_training_begins_is_followed_by_its_end(tmp_path):
    class Breaks(Callback):
        def on_train_begin(self, trainer):
            raise ValueError("a callback's own")

    tracker = Tracker()
    accelerator = Accelerator(cpu=True, log_with=tracker)
    with pytest.raises(ValueError, match="a callback's own"):
        make(tmp_path, accelerator=accelerator, callbacks=[Breaks()]).train()
    events = [json.loads(line)["event"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert events == ["begin", "end"]
    assert tracker.told == ["start", "finish"]


def test_what_a_callback_saves_as_training_begins_is_written_when_it_goes_on(tmp_path):
    class Saves(Callback):
        def on_train_begin(self, trainer):
            found.append(trainer.save().is_dir())

    found = []
    make(tmp_path, callbacks=[Saves()]).train()
    assert found == [True]
