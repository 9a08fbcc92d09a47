import json
import resource
from pathlib import Path

import pytest
import tiny_runs
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from torch.utils.data import Dataset

import homebrew
from homebrew import GPT, Callback, GPTConfig, RunLogger, TokenDataset, Trainer, TrainerConfig
from homebrew.errors import ConfigError
from homebrew.training.schedule import WarmupCosine

MODEL = GPTConfig(block_size=8, vocab_size=32, n_layer=1, n_head=1, n_embd=8)


def make_dataset():
    return TokenDataset.from_tokens(torch.arange(32).repeat(4), 8, vocab_size=32)


def make_trainer(folder, *, train_dataset=None, accelerator=None, callbacks=()):
    config = TrainerConfig(output_dir=folder, max_steps=1, micro_batch_size=2, mixed_precision="no")
    dataset = train_dataset or make_dataset()
    return Trainer(MODEL, dataset, config=config, accelerator=accelerator, callbacks=callbacks)


def read_events(folder):
    return [json.loads(line)["event"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


class RecordingTracker(GeneralTracker):
    """Records the calls it receives: "start", the logged steps, "finish"."""

    name, requires_logging_directory = "recording", False

    def __init__(self):
        super().__init__()
        self.calls = []

    @property
    def tracker(self):
        return self.calls

    def start(self):
        self.calls.append("start")

    def log(self, values, step=None, **_):
        self.calls.append(step)

    def finish(self):
        self.calls.append("finish")


def test_each_run_on_an_accelerator_starts_and_finishes_its_trackers_once(tmp_path):
    tracker = RecordingTracker()
    accelerator = Accelerator(cpu=True, log_with=tracker)
    for run in ("first", "second"):
        make_trainer(tmp_path / run, accelerator=accelerator).train()
        assert tracker.calls == ["start", 1, "finish"]
        tracker.calls.clear()


def test_all_trackers_are_finished_even_if_one_raises(tmp_path):
    class FailsToFinish(RecordingTracker):
        def finish(self):
            super().finish()
            raise OSError("no network")

    trackers = [FailsToFinish(), RecordingTracker()]
    accelerator = Accelerator(cpu=True, log_with=trackers)
    with pytest.warns(UserWarning, match="no network"):
        make_trainer(tmp_path, accelerator=accelerator).train()
    assert [tracker.calls for tracker in trackers] == [["start", 1, "finish"]] * 2


def test_trackers_started_by_the_caller_receive_metrics_and_stay_open(tmp_path):
    tracker = RecordingTracker()
    accelerator = Accelerator(cpu=True, log_with=tracker)
    accelerator.init_trackers("project")
    make_trainer(tmp_path, accelerator=accelerator).train()
    assert tracker.calls == ["start", 1]
    accelerator.end_training()
    assert tracker.calls == ["start", 1, "finish"]


def test_a_tracker_that_failed_to_start_is_started_by_the_next_run(tmp_path):
    class FailsOnce(RecordingTracker):
        def start(self):
            super().start()
            if self.calls == ["start"]:
                raise OSError("no network")

    tracker = FailsOnce()
    accelerator = Accelerator(cpu=True, log_with=tracker)
    with pytest.raises(ConfigError, match=r"recording could not be started.*no network"):
        make_trainer(tmp_path, accelerator=accelerator).train()
    assert read_events(tmp_path) == ["begin", "end"]
    make_trainer(tmp_path, accelerator=accelerator).train()
    assert tracker.calls == ["start", "start", 1, "finish"]


class CustomDataset(Dataset):
    """A custom dataset with the given attributes."""

    def __init__(self, **attributes):
        self.samples = make_dataset()
        vars(self).update(attributes)

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        return self.samples[i]


class TransformersTokenizer:
    """A tokenizer with transformers' interface, which homebrew does not support."""

    name_or_path, vocab_size, eos_token_id = "gpt2", 32, 0

    def encode(self, text):
        return [0]

    def decode(self, ids):
        return ""


def test_a_dataset_with_an_unsupported_tokenizer_is_described_without_it(tmp_path):
    trainer = make_trainer(tmp_path, train_dataset=CustomDataset(tokenizer=TransformersTokenizer()))
    trainer.train()
    assert "tokenizer" not in json.loads((tmp_path / "run.json").read_text())["train_dataset"]
    with pytest.raises(ConfigError, match="Tokenizer"):
        trainer.sample()


def test_values_json_cannot_represent_are_written_as_strings(tmp_path):
    make_trainer(tmp_path, train_dataset=CustomDataset(source=Path("some/text"))).train()
    assert json.loads((tmp_path / "run.json").read_text())["train_dataset"]["source"] == "some/text"


def half(step):
    return 0.5


RUNS = {
    "default": ({}, "AdamW", {"betas": [0.9, 0.95], "weight_decay": 0.1}, "WarmupCosine(warmup_steps=0, "),
    "muon": (
        {"optimizer": "muon", "lr_schedule": "wsd", "warmup_steps": 0},
        "Muon and AdamW",
        {"momentum": 0.95},
        "WarmupStableDecay(",
    ),
    "custom": (
        {"optimizer": lambda p: torch.optim.SGD(p, lr=torch.tensor(0.5)), "schedule": half, "ema_decay": 0.9},
        "SGD",
        {"lr": 0.5, "weight_decay": 0, "nesterov": False},
        "half",
    ),
    "several": (
        {"optimizer": lambda p: [torch.optim.Adagrad([x], lr=0.5) for x in p], "schedule": WarmupCosine(1, 6)},
        "Adagrad",
        {"lr": 0.5},
        "WarmupCosine(warmup_steps=1, ",
    ),
}


@pytest.mark.parametrize(("settings", "name", "group", "schedule"), RUNS.values(), ids=RUNS.keys())
def test_run_json_and_the_log_say_which_optimizer_and_schedule_a_run_has(
    tmp_path, capsys, settings, name, group, schedule
):
    model = GPT(tiny_runs.ONE_LAYER)
    if callable(settings.get("optimizer")):
        settings = settings | {"optimizer": settings["optimizer"](model.parameters())}
    tiny_runs.make_trainer(tmp_path, model=model, max_steps=1, **settings).train()
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["versions"]["homebrew"] == homebrew.__version__
    assert run["optimizer"]["class"] == name
    assert run["optimizer"]["groups"][0].items() >= group.items()
    assert run["schedule"].rpartition("<locals>.")[2].startswith(schedule)
    assert run["config"]["optimizer"] == (settings["optimizer"] if settings.get("optimizer") == "muon" else None)
    assert f"| {name} |" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl"])
def test_an_unwritable_output_dir_is_an_error_before_the_first_step(tmp_path, name):
    (tmp_path / name).mkdir()
    trainer = make_trainer(tmp_path)
    with pytest.raises(ConfigError, match=rf"{tmp_path / name} .*Is a directory.*output_dir"):
        trainer.train()
    assert trainer.step == 0


def test_resume_does_not_follow_links_in_the_run_folder(tmp_path):
    make_trainer(tmp_path / "run").train()
    targets = {name: tmp_path / f"precious-{name}" for name in ("run.json", "metrics.jsonl")}
    for name, target in targets.items():
        target.write_text("a line\nand a half")
        (tmp_path / "run" / name).unlink()
        (tmp_path / "run" / name).symlink_to(target)
    with pytest.raises(ConfigError, match=r"metrics\.jsonl .*symbolic link"):
        make_trainer(tmp_path / "run").train(resume=True)
    assert {target.read_text() for target in targets.values()} == {"a line\nand a half"}
    assert not (tmp_path / "run" / "run.json").is_symlink()  # it has been replaced


def test_leftovers_of_a_killed_start_are_removed(tmp_path):
    (tmp_path / ".run.json.0123abcd").touch()
    make_trainer(tmp_path).train()
    assert not list(tmp_path.glob(".*"))


def test_a_failed_write_keeps_the_previous_run_json(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.*")}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(ConfigError, match="File too large"):
            RunLogger().on_train_begin(trainer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in [*tmp_path.glob("*.*"), *tmp_path.glob(".*")]} == before


def test_the_log_and_trackers_are_closed_after_an_error_in_on_train_begin(tmp_path):
    class Fails(Callback):
        def on_train_begin(self, trainer):
            raise ValueError("from a callback")

    tracker = RecordingTracker()
    accelerator = Accelerator(cpu=True, log_with=tracker)
    with pytest.raises(ValueError, match="from a callback"):
        make_trainer(tmp_path, accelerator=accelerator, callbacks=[Fails()]).train()
    assert read_events(tmp_path) == ["begin", "end"]
    assert tracker.calls == ["start", "finish"]


def test_a_checkpoint_saved_in_on_train_begin_is_written_immediately(tmp_path):
    class Saves(Callback):
        def on_train_begin(self, trainer):
            self.exists = trainer.save().is_dir()

    callback = Saves()
    make_trainer(tmp_path, callbacks=[callback]).train()
    assert callback.exists


def test_run_json_says_how_the_weights_were_drawn(tmp_path):
    drawn = GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=1, n_head=1, n_embd=8), init="local")
    drawn.save_pretrained(tmp_path / "model")
    loaded = GPT.from_pretrained(tmp_path / "model")
    for name, model, init in (("drawn", drawn, "local"), ("loaded", loaded, None)):
        tiny_runs.make_trainer(tmp_path / name, model=model, progress=False, max_steps=1).train()
        assert json.loads((tmp_path / name / "run.json").read_text())["model"]["init"] == init
