"""Parameters that a callback freezes or unfreezes; on several processes see `tests/distributed`."""

import pytest
import torch
from tiny_runs import ONE_LAYER, StopAt, checkpoint_path, equal, make_trainer, matrices_and_vectors, weights
from torch import nn

from homebrew import GPT, LoRAConfig, Muon
from homebrew.callbacks.base import Callback
from homebrew.errors import ConfigError, TrainingError
from homebrew.model.lora import add_lora, merge_lora


class SetTrainable(Callback):
    """Freezes or unfreezes a parameter after a step, and whenever a later step is resumed."""

    def __init__(self, step, value, name="transformer.wpe.weight"):
        self.step, self.value, self.name = step, value, name

    def on_train_begin(self, trainer):
        if trainer.step >= self.step:
            trainer.model.get_parameter(self.name).requires_grad_(self.value)

    on_step_end = on_train_begin


def train(output_dir, optimizer, callback, *callbacks, frozen=(), **config):
    model = GPT(ONE_LAYER)
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    optimizer = optimizer and optimizer(model.parameters())
    trainer = make_trainer(output_dir, model=model, optimizer=optimizer, callbacks=[callback, *callbacks], **config)
    trainer.train(resume=True)
    return weights(trainer)


def muon_and_adamw(parameters):
    matrices, vectors = matrices_and_vectors(parameters)
    return [Muon(matrices, lr=1e-2, weight_decay=0.1), torch.optim.AdamW(vectors, lr=1e-2, fused=True)]


OPTIMIZERS = {
    "built-in": None,
    "muon": lambda parameters: "muon",
    "several": muon_and_adamw,
    "AdamW": torch.optim.AdamW,
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1),
}


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("step", [0, 2])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_parameter_frozen_by_a_callback_stays_as_it_is_and_the_run_resumes(tmp_path, optimizer, step):
    optimizer, freeze = OPTIMIZERS[optimizer], SetTrainable(step, value=False)
    frozen_from = train(tmp_path / "before", optimizer, freeze, StopAt(step)) if step else GPT(ONE_LAYER).state_dict()
    uninterrupted = train(tmp_path / "uninterrupted", optimizer, freeze)
    train(tmp_path / "stopped", optimizer, freeze, StopAt(3))
    assert equal(train(tmp_path / "stopped", optimizer, freeze), uninterrupted)
    same = {name for name in uninterrupted if torch.equal(uninterrupted[name], frozen_from[name])}
    assert same == {"transformer.wpe.weight"}


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("optimizer", ["AdamW", "momentum", "several"])
def test_a_parameter_unfrozen_by_a_callback_is_trained_and_the_run_resumes(tmp_path, optimizer):
    optimizer, name, unfreeze = OPTIMIZERS[optimizer], "transformer.wpe.weight", SetTrainable(2, value=True)
    uninterrupted = train(tmp_path / "uninterrupted", optimizer, unfreeze, frozen=[name])
    assert not uninterrupted[name].equal(GPT(ONE_LAYER).state_dict()[name])
    for step in (1, 3):
        train(tmp_path / str(step), optimizer, unfreeze, StopAt(step), frozen=[name])
        assert equal(train(tmp_path / str(step), optimizer, unfreeze, frozen=[name]), uninterrupted)


def test_the_gradient_of_an_unfrozen_parameter_is_clipped(tmp_path):
    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=1.0)

    name = "transformer.wte.weight"  # its gradient is the largest
    config = {"max_grad_norm": 1e-2, "schedule": lambda step: 1.0, "max_steps": 1, "frozen": [name]}
    after = train(tmp_path, sgd, SetTrainable(0, value=True, name=name), **config)
    before = GPT(ONE_LAYER).state_dict()
    updates = [after[name] - before[name] for name in before if name != "lm_head.weight"]
    assert torch.cat([update.flatten() for update in updates]).norm() == pytest.approx(1e-2, rel=1e-3)


def test_unfreezing_a_parameter_that_the_optimizer_does_not_hold_is_an_error(tmp_path):
    name = "transformer.wpe.weight"
    with pytest.raises(ConfigError, match=rf"optimizer lacks.*{name}"):
        train(tmp_path, None, SetTrainable(2, value=True), frozen=[name], save_every=1)
    assert checkpoint_path(tmp_path, 2).exists()


def test_freezing_every_parameter_is_an_error(tmp_path):
    class FreezeAll(Callback):
        def on_step_end(self, trainer):
            trainer.model.requires_grad_(False)

    with pytest.raises(ConfigError, match="No parameter"):
        train(tmp_path, torch.optim.AdamW, FreezeAll())


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.transformer.ln_f.weight.requires_grad_(True),
        lambda model: model.transformer.h[0].attn.c_attn.lora_A.requires_grad_(False),
        merge_lora,
    ],
    ids=["base", "adapter", "merged"],
)
def test_the_trainable_parameters_of_an_adapted_model_cannot_change(tmp_path, change):
    """They determine which weights a checkpoint holds."""

    class Change(Callback):
        def on_train_begin(self, trainer):
            change(trainer.model)

    model = GPT(ONE_LAYER)
    add_lora(model, LoRAConfig(rank=2))
    with pytest.raises(TrainingError, match="requires_grad"):
        make_trainer(tmp_path, model=model, callbacks=[Change()]).train()


def test_an_adapter_added_by_a_callback_is_an_error(tmp_path):
    class AddLoRA(Callback):
        def on_train_begin(self, trainer):
            add_lora(trainer.model, LoRAConfig(rank=2))

    with pytest.raises(TrainingError, match="requires_grad"):
        train(tmp_path, None, AddLoRA())


def replace(model):
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)


def untie(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())


def remove(model):
    del model.transformer.ln_f.bias
    model.transformer.ln_f.bias = None


STRUCTURE_CHANGES = {
    "replaced": (replace, r"transformer|lm_head"),
    "untied": (untie, "lm_head.weight"),
    "removed": (remove, "transformer.ln_f.bias"),
    "added": (lambda model: model.register_parameter("gain", nn.Parameter(torch.ones(()))), "gain"),
    "module added": (lambda model: model.transformer.h[0].add_module("extra", nn.Linear(2, 2)), "extra.bias"),
    "frozen added": (lambda model: setattr(model, "gain", nn.Parameter(torch.ones(1), requires_grad=False)), "gain"),
}


@pytest.mark.parametrize("step", [0, 2, 6])
@pytest.mark.parametrize("name", STRUCTURE_CHANGES)
def test_a_parameter_added_replaced_or_removed_is_an_error(tmp_path, name, step):
    change, parameter = STRUCTURE_CHANGES[name]

    class Change(Callback):
        def on_step_end(self, trainer):
            if trainer.step == step:
                change(trainer.model)

    trainer = make_trainer(tmp_path, model=GPT(ONE_LAYER), callbacks=[Change()])
    if step == 0:
        change(trainer.model)
    with pytest.raises(TrainingError, match=f"{parameter}.* has been added, replaced or removed"):
        trainer.train()
    assert trainer.step == step


def test_modules_without_parameters_may_change(tmp_path):
    class AddModule(Callback):
        def on_step_end(self, trainer):
            trainer.model.add_module(f"step{trainer.step}", nn.Dropout(0.0))

    make_trainer(tmp_path, model=GPT(ONE_LAYER), callbacks=[AddModule()]).train()
