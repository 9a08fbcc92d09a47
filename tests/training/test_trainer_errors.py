"""Errors that a Trainer raises before anything is trained."""

import numpy as np
import pytest
import torch
from tiny_runs import (
    ONE_LAYER,
    StopAt,
    UnevenTargets,
    equal,
    make_trainer,
    random_tokens,
    saved_steps,
    token_dataset,
    weights,
)

from homebrew import GPT, TokenDataset
from homebrew.errors import ConfigError, DataError, LaunchError, ModelError, TrainingError


def test_a_dataset_the_model_cannot_read_is_an_error(tmp_path):
    dataset = TokenDataset.from_tokens(random_tokens(), 32, vocab_size=50)
    with pytest.raises(DataError, match=r"(?s)train_dataset.*block_size"):
        make_trainer(tmp_path, train_dataset=dataset)
    with pytest.raises(DataError, match=r"(?s)eval_dataset.*block_size"):
        make_trainer(tmp_path, eval_dataset=dataset)


def test_a_model_without_trainable_parameters_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="No parameter"):
        make_trainer(tmp_path, model=GPT(ONE_LAYER).requires_grad_(False))


def test_an_optimizer_over_other_parameters_is_an_error(tmp_path):
    optimizer = torch.optim.SGD(GPT(ONE_LAYER).parameters(), lr=0.1)
    with pytest.raises(ConfigError, match=r"model\.parameters\(\)"):
        make_trainer(tmp_path, model=GPT(ONE_LAYER), optimizer=optimizer)


def test_an_optimizer_must_have_all_trainable_parameters(tmp_path):
    model = GPT(ONE_LAYER)
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    with pytest.raises(ConfigError, match=r"wte\.weight.*requires_grad_\(False\)"):
        make_trainer(tmp_path, model=model, optimizer=torch.optim.SGD(vectors, lr=0.1))
    for parameter in model.parameters():
        parameter.requires_grad = parameter.dim() < 2
    make_trainer(tmp_path, model=model, optimizer=torch.optim.SGD(vectors, lr=0.1))


def test_a_schedule_must_return_numbers(tmp_path):
    make_trainer(tmp_path, schedule=lambda step: np.float32(0.5))
    with pytest.raises(ConfigError, match=r"schedule\(0\) returned None"):
        make_trainer(tmp_path, schedule=lambda step: None)


@pytest.mark.parametrize("value", [np.nan, None, -1.0])
def test_a_schedule_that_fails_later_leaves_the_weights_unchanged(tmp_path, value):
    """The multipliers that a Trainer checks at its start were valid."""
    failures = []
    trainer = make_trainer(tmp_path, schedule=lambda step: value if failures else 1.0)
    trainer.callbacks.append(StopAt(3))
    trainer.train()
    before = weights(trainer)
    trainer.callbacks.pop()
    failures.append("every step")
    with pytest.raises(ConfigError, match=r"schedule\(0\) returned"):
        trainer.train(resume=True)
    assert equal(weights(trainer), before)
    assert saved_steps(tmp_path) == [3]


@pytest.mark.parametrize(
    "change",
    [
        lambda loss: None,
        lambda loss: (None, loss),
        lambda loss: {"loss": loss},
        lambda loss: loss.expand(2),
        lambda loss: loss[None],
        lambda loss: float(loss.detach()),
        lambda loss: loss.detach().long(),
    ],
)
@pytest.mark.parametrize("where", ["training", "evaluation"])
def test_a_model_must_return_a_scalar_loss(tmp_path, change, where):
    class Changed(GPT):
        def forward(self, input_ids, targets=None):
            return change(super().forward(input_ids, targets))

    trainer = make_trainer(tmp_path, model=Changed(ONE_LAYER), compile=False)
    with pytest.raises(ModelError, match=r"forward\(input_ids, targets\) returned .* scalar"):
        trainer.train() if where == "training" else trainer.evaluate(token_dataset())


class AssertsClosure(torch.optim.SGD):
    """Needs a closure, but its signature does not show it."""

    def step(self, closure=None):
        assert closure is not None, "needs a closure"


class NoStep(torch.optim.Optimizer):
    """An optimizer that does not implement step."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (AssertsClosure, {}),
        (NoStep, {}),
        pytest.param(
            torch.optim.AdamW,
            {"capturable": True},
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="supported on a GPU"),
        ),
    ],
)
def test_an_optimizer_that_cannot_step_is_named(tmp_path, optimizer, options):
    model = GPT(ONE_LAYER)
    trainer = make_trainer(tmp_path, model=model, optimizer=optimizer(model.parameters(), lr=0.1, **options))
    with pytest.raises(TrainingError, match=rf"{optimizer.__name__}\.step\(\) failed"):
        trainer.train()


@pytest.mark.parametrize("fingerprint", [b"sha256", 7, None, lambda: "abc"])
def test_the_fingerprint_of_a_dataset_must_be_a_string(tmp_path, fingerprint):
    dataset = UnevenTargets()
    dataset.fingerprint = fingerprint
    with pytest.raises(DataError, match=r"fingerprint is .*string"):
        make_trainer(tmp_path, train_dataset=dataset)


@pytest.mark.parametrize("target", ["nowhere", "link"], ids=["dangling", "loop"])
def test_an_output_dir_that_is_a_link_to_nothing_is_an_error(tmp_path, target):
    (tmp_path / "link").symlink_to(target)
    for output_dir in (tmp_path / "link", tmp_path / "link" / "run"):
        with pytest.raises(ConfigError, match="link: a symbolic link to nothing"):
            make_trainer(output_dir).train()


@pytest.mark.parametrize("aspects", [["optimizer"], ("seed", "schedule")])
def test_changes_can_be_accepted_only_on_resume(tmp_path, aspects):
    with pytest.raises(ConfigError, match="resume=True"):
        make_trainer(tmp_path).train(accept_changes=aspects)
    make_trainer(tmp_path, max_steps=1).train(resume=True, accept_changes=aspects)


def test_an_output_dir_that_is_a_file_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="output_dir"):
        make_trainer(tmp_path / "file").train()


@pytest.mark.parametrize(
    "environment",
    [
        {"WORLD_SIZE": "2"},  # torchrun's, without what Accelerate needs to join
        {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_MIXED_PRECISION": "no"},  # a launcher that started one of many
    ],
    ids=["world size", "launcher"],
)
def test_a_launch_that_accelerate_does_not_join_is_an_error(tmp_path, monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError, match="process"):
        make_trainer(tmp_path)


@pytest.mark.parametrize("disabled", [torch.no_grad, torch.inference_mode, lambda: torch.set_grad_enabled(False)])
def test_training_without_gradients_is_an_error(tmp_path, disabled):
    trainer = make_trainer(tmp_path, model=ONE_LAYER)
    with disabled(), pytest.raises(ConfigError, match=r"no_grad.*inference_mode"):
        trainer.train()
    torch.set_grad_enabled(True)


def test_eval_every_without_an_eval_dataset_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"eval_every=2.*eval_dataset"):
        make_trainer(tmp_path, eval_every=2)
