import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from homebrew import GPT, GPTConfig
from homebrew.checkpoint.compatibility import ASPECTS, check_accept_changes, check_identity, check_ranks, run_identity
from homebrew.checkpoint.manifest import Checkpoint, Manifest
from homebrew.errors import ConfigError, LaunchError, ResumeMismatch
from homebrew.model.lora import LoRAConfig, add_lora
from homebrew.training.schedule import warmup_cosine


class Samples(list):
    """A custom dataset."""


def gpt(*, lora=None, seed=42, **shape):
    model = GPT(
        GPTConfig(**{"block_size": 8, "vocab_size": 50, "n_layer": 1, "n_head": 1, "n_embd": 8} | shape), seed=seed
    )
    if lora is not None:
        add_lora(model, lora)
    return model


MODEL = gpt()


def constant(step):
    return 1.0


def make(*, seed=42, lr=0.1, momentum=0.0, num_steps=100, **changes):
    arguments = {
        "dataset": Samples(range(10)),
        "model": gpt(),
        "optimizer": torch.optim.SGD([torch.zeros(1)], lr=lr, momentum=momentum),
        "schedule": warmup_cosine(warmup_steps=5, max_steps=100),
        "max_steps": 100,
        "max_grad_norm": 1.0,
        "seed": seed,
        "global_batch_size": 8,
    }
    return run_identity(**arguments | changes)(num_steps)


CHANGES = {
    "dataset": ({"dataset": Samples(range(11))}, "'10 samples'"),
    "model": ({"model": gpt(dropout=0.5)}, "dropout was 0.5, is 0.0"),
    "adapter": ({"model": gpt(lora=LoRAConfig(alpha=3.0))}, "adapter: alpha was 3.0, is 2.0"),
    "optimizer": ({"momentum": 0.9}, "momentum was '0.9', is '0.0'"),
    "schedule": (
        {"schedule": warmup_cosine(warmup_steps=9, max_steps=100)},
        "schedule: learning rate at step 0 was 0.0111111, is 0.02.",
    ),
    "global_batch_size": ({"global_batch_size": 16}, "was 16, is 8"),
    "seed": ({"seed": 1}, "was 1, is 42"),
}


def test_the_same_run_resumes():
    check_identity(make(), make(), ())


@pytest.mark.parametrize("aspect", CHANGES)
def test_a_difference_is_named_and_can_be_accepted(aspect):
    changes, message = CHANGES[aspect]
    original = {"model": gpt(lora=LoRAConfig(alpha=2.0))} if aspect == "adapter" else {}
    ours, saved = (make(**changes), make()) if aspect == "dataset" else (make(**original), make(**changes))
    with pytest.raises(ResumeMismatch, match=aspect) as caught:
        check_identity(saved, ours, ())
    assert message in str(caught.value)
    assert f"accept_changes=('{aspect}',)" in str(caught.value)
    keeps_all_state = aspect in ("model", "adapter")
    assert check_identity(saved, ours, (aspect,)) == (set() if keeps_all_state else {aspect})


@pytest.mark.parametrize("aspect", CHANGES)
def test_ranks_must_have_the_same_settings(monkeypatch, aspect):
    other = json.dumps({"result": make(**CHANGES[aspect][0])}).encode()
    check_ranks(Accelerator(cpu=True), make())
    monkeypatch.setattr("homebrew.distributed.collectives.gather_bytes", lambda _, data: [data, data, other])
    with pytest.raises(LaunchError, match=rf"Rank 2 (?s:.*){aspect}: "):
        check_ranks(Accelerator(cpu=True), make())


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (gpt(n_layer=3), "model: n_layer was 3, is 1"),
        (gpt(vocab_size=300), "model: vocab_size was 300, is 50"),
        (gpt(lora=LoRAConfig(rank=2)), "adapter: was {'rank': 2"),
    ],
)
def test_weights_that_do_not_fit_cannot_be_accepted(saved, message):
    for accepted in ((), ASPECTS):
        with pytest.raises(ResumeMismatch, match=f"{message}(?s:.*)do not fit") as caught:
            check_identity(make(model=saved), make(), accepted)
        assert "accept" not in str(caught.value)


def test_the_peak_learning_rate_is_the_optimizers():
    with pytest.raises(ResumeMismatch, match=r"schedule: learning rate at step 0 was 0\.02, is 0\.2\.\n"):
        check_identity(make(lr=0.1), make(lr=1.0), ())


def test_rates_that_differ_in_late_digits_are_shown_with_all_digits():
    with pytest.raises(ResumeMismatch, match=r"at step 0 was 0\.10000001\d*, is 0\.1000000\d*\.\n"):
        check_identity(make(lr=0.10000001, schedule=constant), make(lr=0.1, schedule=constant), ())


@pytest.mark.parametrize("num_steps", [100, 5000])
@pytest.mark.parametrize("step", [1, 7, 98])
def test_schedules_that_differ_at_one_step_are_different(num_steps, step):
    saved = make(schedule=lambda s: 1.0 + (s == step), num_steps=num_steps)
    ours = make(schedule=constant, num_steps=num_steps)
    with pytest.raises(ResumeMismatch, match=r"schedule: multipliers differ\.\n"):
        check_identity(saved, ours, ())
    assert check_identity(saved, ours, ["schedule"]) == {"schedule"}


def test_another_number_of_steps_is_named_if_it_changes_the_past():
    check_identity(make(schedule=constant), make(schedule=constant, max_steps=200), ())
    longer = make(schedule=warmup_cosine(warmup_steps=5, max_steps=200), max_steps=200)
    with pytest.raises(ResumeMismatch, match=r"schedule: max_steps was 100, is 200, learning rate at step 6 was"):
        check_identity(make(), longer, ())


@pytest.mark.parametrize("num_steps", [0, 1, 2, 40, 5000])
def test_only_steps_that_have_been_taken_count(num_steps):
    ours = make(schedule=constant, num_steps=num_steps)
    saved = make(schedule=lambda step: 1.0 + (step >= num_steps), num_steps=num_steps)
    check_identity(saved, ours, ())
    if num_steps:
        other = make(schedule=lambda step: 1.0 + (step >= num_steps - 1), num_steps=num_steps)
        with pytest.raises(ResumeMismatch, match="schedule"):
            check_identity(other, ours, ())


def sgd(*groups, model=MODEL, **defaults):
    """Return the model and an optimizer with groups of (indices of the parameters, settings)."""
    parameters = list(model.parameters())
    groups = [{"params": [parameters[i] for i in indices], **settings} for indices, settings in groups]
    return {"model": model, "optimizer": torch.optim.SGD(groups, **{"lr": 0.1} | defaults)}


@pytest.mark.parametrize(
    ("saved", "ours", "aspect"),
    [
        ((([0, 1], {"lr": 0.1}), ([2], {"lr": 0.2})), (([0, 1], {"lr": 0.2}), ([2], {"lr": 0.1})), "schedule"),
        ((([0], {}), ([1], {}), ([2], {"lr": 1.0})), (([0], {}), ([1], {"lr": 1.0}), ([2], {})), "schedule"),
        ((([0, 1], {}), ([2], {})), (([0], {}), ([1, 2], {})), "optimizer"),
        ((([0], {}), ([1], {})), (([1], {}), ([0], {})), "optimizer"),
        ((([0, 1, 2], {}),), (([0, 1], {}), ([2], {})), "optimizer"),
        ((([0, 1], {}),), (([0], {}),), "optimizer"),  # the other parameter is frozen
        ((([0], {"momentum": 0.9}), ([1], {})), (([0], {}), ([1], {"momentum": 0.9})), "optimizer"),
        ((([0], {"sign": True}), ([1], {"sign": False})), (([0], {"sign": False}), ([1], {"sign": True})), "optimizer"),
        ((([0], {"lr_mult": 2}), ([1], {})), (([0], {}), ([1], {"lr_mult": 2})), "optimizer"),
        ((([0], {}),), (([0], {"use_muon": True}),), "optimizer"),
    ],
    ids=[
        "rates exchanged",
        "rate moved",
        "moved",
        "exchanged",
        "split",
        "removed",
        "setting exchanged",
        "custom setting exchanged",
        "custom setting moved",
        "custom setting added",
    ],
)
def test_each_parameter_must_have_the_same_settings(saved, ours, aspect):
    with pytest.raises(ResumeMismatch, match=f"{aspect}: ") as caught:
        check_identity(make(**sgd(*saved)), make(**sgd(*ours)), ())
    assert f"accept_changes=('{aspect}',)" in str(caught.value)


def test_the_order_within_a_group_does_not_matter():
    check_identity(make(**sgd(([0, 1, 2], {}))), make(**sgd(([2, 0, 1], {}))), ())


@pytest.mark.parametrize(
    ("change", "keeps_state"),
    [
        ({"weight_decay": 0.5}, True),
        ({"betas": (0.8, 0.9), "eps": 1e-6}, True),
        ({"betas": (torch.tensor(0.8), torch.tensor(0.9)), "foreach": False, "capturable": True}, True),
        ({"amsgrad": True}, False),
        ({"betas": (0.9, 0.99, 0.999)}, False),  # one more moment
        ({"weight_decay": 0.5, "maximize": True}, False),
    ],
)
def test_an_optimizers_state_is_valid_only_with_its_own_settings(change, keeps_state):
    saved, ours = (torch.optim.AdamW([torch.zeros(1)], **{"lr": 0.1} | options) for options in ({}, change))
    with pytest.raises(ResumeMismatch, match="optimizer: "):
        check_identity(make(optimizer=saved), make(optimizer=ours), ())
    changed = check_identity(make(optimizer=saved), make(optimizer=ours, max_grad_norm=9.0), ["optimizer"])
    assert changed == (set() if keeps_state else {"optimizer"})


def test_an_optimizer_of_the_same_name_from_another_package_is_another_one():
    custom = type("SGD", (torch.optim.SGD,), {"__module__": "custom.optim"})
    with pytest.raises(ResumeMismatch, match=r"class was 'SGD', is 'custom\.SGD'"):
        check_identity(make(), make(optimizer=custom([torch.zeros(1)], lr=0.1)), ())


def test_implementation_options_of_an_optimizer_are_ignored():
    slow, fast = (torch.optim.SGD([torch.zeros(1)], lr=0.1, foreach=foreach) for foreach in (False, True))
    check_identity(make(optimizer=slow), make(optimizer=fast), ())


def test_equal_settings_of_other_types_are_equal():
    integer, real = (torch.optim.AdamW([torch.zeros(1)], lr=0.1, weight_decay=decay) for decay in (0, 0.0))
    real.param_groups[0]["betas"] = [0.9, 0.999]  # loading a state dict turns tuples into lists
    check_identity(make(optimizer=integer), make(optimizer=real), ())


@pytest.mark.parametrize("accepted", [("weather",), "optimizer", "seed", None, [["seed"]], 3, {"seed": 1, 2: 3}])
def test_an_unknown_aspect_is_refused(accepted):
    with pytest.raises(ConfigError, match=r"accept_changes=.* names among"):
        check_accept_changes(accepted)


def test_an_adapter_with_another_base_is_another_run():
    saved, ours = (make(model=gpt(lora=LoRAConfig(rank=2), seed=seed)) for seed in (1, 2))
    with pytest.raises(ResumeMismatch, match="adapter: base_sha256 differs"):
        check_identity(saved, ours, ())


@pytest.mark.parametrize("hostile", [None, [], "x", {"model": 3, "schedule": [[None]], "dataset": {}}])
def test_an_invalid_identity_is_another_run(hostile):
    checkpoint = Checkpoint(Path("step"), 1, {"identity": hostile}, Manifest(1, None, {}))
    with pytest.raises(ResumeMismatch):
        check_identity(checkpoint.identity, make(), ())
