import pytest
import torch

from homebrew import GPT, GPTConfig
from homebrew.checkpoint.compatibility import check_identity, run_identity
from homebrew.errors import ConfigError, ResumeMismatch
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


def make(*, seed=42, lr=0.1, momentum=0.0, **changes):
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
    return run_identity(**arguments | changes)


CHANGES = {
    "dataset": ({"dataset": Samples(range(11))}, "'10 samples'"),
    "model": ({"model": gpt(n_layer=3)}, "n_layer was 3, is 1"),
    "adapter": ({"model": gpt(lora=LoRAConfig(rank=2))}, "adapter: was {'rank': 2"),
    "optimizer": ({"momentum": 0.9}, "momentum was '0.9', is '0.0'"),
    "schedule": (
        {"schedule": warmup_cosine(warmup_steps=9, max_steps=100)},
        "learning rates first differ at step 0: was 0.0111111, is 0.02",
    ),
    "global_batch_size": ({"global_batch_size": 16}, "was 16, is 8"),
    "seed": ({"seed": 1}, "was 1, is 42"),
}


def test_the_same_run_resumes():
    check_identity(make(), make(), ())


@pytest.mark.parametrize("aspect", CHANGES)
def test_a_difference_is_named_and_can_be_accepted(aspect):
    changes, message = CHANGES[aspect]
    ours, saved = (make(**changes), make()) if aspect == "dataset" else (make(), make(**changes))
    with pytest.raises(ResumeMismatch, match=aspect) as caught:
        check_identity(saved, ours, ())
    assert message in str(caught.value)
    assert f"accept_changes=('{aspect}',)" in str(caught.value)
    check_identity(saved, ours, (aspect,))


def test_the_peak_learning_rate_is_the_optimizers():
    with pytest.raises(ResumeMismatch, match="schedule: learning rates first differ at step 0"):
        check_identity(make(lr=0.1), make(lr=1.0), ())


def test_implementation_options_of_an_optimizer_are_ignored():
    slow, fast = (torch.optim.SGD([torch.zeros(1)], lr=0.1, foreach=foreach) for foreach in (False, True))
    check_identity(make(optimizer=slow), make(optimizer=fast), ())


def test_equal_settings_of_other_types_are_equal():
    integer, real = (torch.optim.AdamW([torch.zeros(1)], lr=0.1, weight_decay=decay) for decay in (0, 0.0))
    real.param_groups[0]["betas"] = [0.9, 0.999]  # loading a state dict turns tuples into lists
    real.param_groups[0]["k"] = 3  # state, not a setting
    check_identity(make(optimizer=integer), make(optimizer=real), ())


def test_an_unknown_aspect_is_refused():
    with pytest.raises(ConfigError, match="'weather'"):
        check_identity(make(), make(), ("weather",))


def test_an_adapter_with_another_base_is_another_run():
    saved, ours = (make(model=gpt(lora=LoRAConfig(rank=2), seed=seed)) for seed in (1, 2))
    with pytest.raises(ResumeMismatch, match="adapter: base_sha256 was"):
        check_identity(saved, ours, ())


@pytest.mark.parametrize("hostile", [None, [], "x", {"model": 3, "schedule": [[None]], "dataset": {}}])
def test_an_invalid_identity_is_another_run(hostile):
    with pytest.raises(ResumeMismatch):
        check_identity(hostile, make(), ())
