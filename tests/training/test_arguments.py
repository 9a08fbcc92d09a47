"""Arguments that a Trainer cannot use are errors before anything is built, trained or written."""

import math

import pytest
import torch
from accelerate import Accelerator
from tiny_runs import ONE_LAYER, StopAt, make_trainer, token_dataset
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from transformers import TrainerCallback
from transformers.optimization import Adafactor

from homebrew import (
    GPT,
    Callback,
    EarlyStopping,
    LoRAConfig,
    ProgressDisplay,
    TokenDataset,
    Trainer,
    TrainerConfig,
    warmup_cosine,
)
from homebrew.errors import ConfigError, DataError
from homebrew.training.schedule import WarmupCosine


class NeedsClosure(torch.optim.SGD):
    """An optimizer that evaluates the loss itself, like LBFGS."""

    def step(self, closure):
        closure()
        super().step()


def sgd(**options):
    return torch.optim.SGD([torch.zeros(1)], **{"lr": 0.1} | options)


def group_without_lr(parameters):
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    del optimizer.param_groups[0]["lr"]
    return optimizer


OPTIMIZERS = {
    "closure LBFGS": torch.optim.LBFGS,
    "closure NeedsClosure": lambda parameters: NeedsClosure(parameters, lr=0.1),
    "lr=None": lambda parameters: Adafactor(parameters, relative_step=True),
    "lr=nan": lambda parameters: torch.optim.Adagrad([{"params": parameters, "lr": math.nan}]),
    "lr=inf": lambda parameters: torch.optim.AdamW([{"params": parameters, "lr": math.inf}]),
    "lr=1000": lambda parameters: torch.optim.SGD([{"params": parameters, "lr": 10**400}], lr=0.1),
    "lr=-1": lambda parameters: torch.optim.SGD([{"params": parameters, "lr": -1.0}], lr=0.1),
    "lr=None (removed)": group_without_lr,
    "Accelerator": lambda parameters: Accelerator(mixed_precision="no").prepare(torch.optim.SGD(parameters, lr=0.1)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_that_the_trainer_cannot_step_is_an_error(tmp_path, name):
    model = GPT(ONE_LAYER)
    with pytest.raises(ConfigError, match=name.split()[0]):
        make_trainer(tmp_path, model=model, optimizer=OPTIMIZERS[name](model.parameters()))


UNUSED = [
    ("optimizer", {"learning_rate": 6e-4}, "learning_rate=0.0006"),
    ("optimizer", {"betas": (0.9, 0.95)}, r"betas=\(0.9, 0.95\)"),  # also the value that AdamW has by default
    ("optimizer", {"weight_decay": 0.0}, "weight_decay=0.0"),
    ("optimizer", {"optimizer": "muon", "muon_momentum": 0.9}, "optimizer='muon', muon_momentum=0.9"),
    ("schedule", {"lr_schedule": "linear"}, "lr_schedule='linear'"),
    ("schedule", {"lr_schedule": "wsd", "decay_fraction": 0.3}, "lr_schedule='wsd', decay_fraction=0.3"),
    ("schedule", {"warmup_steps": 0}, "warmup_steps=0"),
    ("schedule", {"min_lr_ratio": 0.1}, "min_lr_ratio=0.1"),
]


@pytest.mark.parametrize(("name", "settings", "message"), UNUSED, ids=[message for _, _, message in UNUSED])
def test_settings_that_a_custom_part_replaces_are_an_error(tmp_path, name, settings, message):
    model = GPT(ONE_LAYER)
    custom = {"optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "schedule": lambda step: 1.0}[name]
    config = TrainerConfig(output_dir=tmp_path, max_steps=1, **settings)
    with pytest.raises(ConfigError, match=f"{message}: not used with a custom {name}"):
        Trainer(model, token_dataset(), config=config, **{name: custom})


def test_settings_that_a_custom_part_does_not_replace_are_used(tmp_path):
    model = GPT(ONE_LAYER)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = {"lr_schedule": "wsd", "warmup_steps": 1, "decay_fraction": 0.3, "min_lr_ratio": 0.2}
    make_trainer(tmp_path, model=model, optimizer=optimizer, **settings)
    settings = {"optimizer": "muon", "muon_momentum": 0.9, "betas": (0.8, 0.9), "weight_decay": 0.0}
    make_trainer(tmp_path, schedule=lambda step: 1.0, **settings)


@pytest.mark.parametrize(
    ("settings", "is_reached"),
    [
        ({"max_steps": 142}, False),  # the decay begins at step 99
        ({"max_steps": 143}, True),
        ({"max_steps": 99, "decay_fraction": 0.0}, False),
        ({"max_steps": 50, "warmup_steps": 50}, True),  # as the user wants it
    ],
)
def test_a_default_warmup_that_is_too_long_is_a_warning(tmp_path, recwarn, settings, is_reached):
    make_trainer(tmp_path, lr_schedule="wsd", **settings)
    assert ["warmup_steps" in str(warning.message) for warning in recwarn] == [True] * (not is_reached)


def test_a_timeout_that_a_custom_accelerator_does_not_use_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"collective_timeout_seconds=30.*InitProcessGroupKwargs"):
        make_trainer(tmp_path, accelerator=Accelerator(mixed_precision="no"), collective_timeout_seconds=30)


def test_transformers_adafactor_trains_with_a_learning_rate(tmp_path):
    model = GPT(ONE_LAYER)
    optimizer = Adafactor(model.parameters(), lr=1e-3, relative_step=False, scale_parameter=False)
    make_trainer(tmp_path, model=model, optimizer=optimizer, max_steps=4, callbacks=[StopAt(2)]).train()
    make_trainer(tmp_path, model=model, optimizer=optimizer, max_steps=4).train(resume=True)


@pytest.mark.parametrize(
    "schedule",
    [
        LambdaLR(sgd(), lambda step: 1.0),
        ReduceLROnPlateau(sgd()),
        LambdaLR,
        WarmupCosine,
        warmup_cosine,
        lambda: 1.0,
        lambda step, total: step / total,
        0.5,
        0,
        "cosine",
        [1.0, 0.5],
    ],
    ids=lambda schedule: getattr(schedule, "__name__", type(schedule).__name__),
)
def test_a_schedule_must_be_a_function_of_the_step(tmp_path, schedule):
    with pytest.raises(ConfigError, match=r"schedule is .* must be a function from the step"):
        make_trainer(tmp_path, schedule=schedule)


class TransformersCallback(TrainerCallback):
    """A callback for another Trainer."""


@pytest.mark.parametrize(
    "callbacks",
    [
        None,
        Callback(),
        [EarlyStopping],
        [TransformersCallback()],
        [lambda trainer: None],
        [None],
        "progress",
    ],
)
def test_callbacks_must_be_callbacks(tmp_path, callbacks):
    with pytest.raises(ConfigError, match=r"^callbacks(\[0\])? is "):
        make_trainer(tmp_path, callbacks=callbacks)


def half():
    return GPT(ONE_LAYER).half()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", None),
        ("model", GPT),
        ("model", "gpt2"),
        ("model", nn.Linear(2, 2)),
        ("model", {"n_layer": 1}),
        ("model", nn.Sequential(GPT(ONE_LAYER))),
        ("model", torch.compile(GPT(ONE_LAYER))),
        ("model", LoRAConfig()),
        ("model", half()),
        ("config", None),
        ("config", {"max_steps": 1}),
        ("config", ONE_LAYER),
        ("config", TrainerConfig),
        ("optimizer", "adamw"),
        ("optimizer", torch.optim.AdamW),
        ("optimizer", LambdaLR(sgd(), lambda step: 1.0)),
        ("optimizer", {"adamw": sgd()}),
        ("optimizer", []),
        ("accelerator", "cpu"),
        ("accelerator", Accelerator),
        ("accelerator", torch.device("cpu")),
        ("progress", "no"),
        ("progress", None),
        ("progress", ProgressDisplay()),
    ],
)
def test_an_argument_of_another_type_is_an_error(tmp_path, name, value):
    arguments = {"model": ONE_LAYER, "train_dataset": token_dataset()}
    arguments["config"] = TrainerConfig(output_dir=tmp_path, max_steps=1, mixed_precision="no")
    with pytest.raises(ConfigError, match=f"{name}('s .*)? is ") as raised:
        Trainer(**arguments | {name: value})
    assert len(str(raised.value)) < 300
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "dataset",
    [
        3,
        "book.txt",
        TokenDataset,
        token_dataset().split(0.5),
        {"train": token_dataset()},
        torch.zeros(8, dtype=torch.int64),
        torch.utils.data.DataLoader(token_dataset()),
        iter(token_dataset()),
    ],
    ids=lambda dataset: type(dataset).__name__,
)
@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset"])
def test_a_dataset_of_another_type_is_an_error(tmp_path, name, dataset):
    with pytest.raises(DataError, match=name):
        make_trainer(tmp_path, **{name: dataset})


def test_training_without_a_dataset_is_an_error(tmp_path):
    config = TrainerConfig(output_dir=tmp_path, max_steps=1, mixed_precision="no")
    with pytest.raises(DataError, match="train_dataset is of type NoneType"):
        Trainer(ONE_LAYER, None, config=config)


@pytest.mark.parametrize("accepted", ["optimizer", None, ["weather"], [3]])
def test_accept_changes_must_be_a_list_of_aspects(tmp_path, accepted):
    """Also if there is no checkpoint to compare with."""
    with pytest.raises(ConfigError, match="accept_changes="):
        make_trainer(tmp_path).train(resume=True, accept_changes=accepted)
