"""Resuming with `accept_changes`: which state of the checkpoint is used, and which is not."""

import shutil
from functools import cache

import pytest
import torch
from tiny_runs import (
    ONE_LAYER,
    StopAt,
    checkpoint_path,
    checkpoint_tensors,
    equal,
    make_trainer,
    matrices_and_vectors,
    random_tokens,
    token_dataset,
    weights,
)
from torch.utils.data import Dataset

from homebrew import GPT, Callback, GPTConfig, Muon
from homebrew.checkpoint.optimizer_state import state_tensors
from homebrew.errors import ResumeMismatch
from homebrew.model.lora import LoRAConfig, add_lora


class NumberState(torch.optim.Optimizer):
    """Sign descent, with plain numbers in its state and in its parameter groups."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 1e-3, "num_calls": 0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["num_calls"] += 1
            for parameter in group["params"]:
                state = self.state[parameter]
                state["step"] = state.get("step", 0) + 1
                parameter.sub_(parameter.grad.sign(), alpha=group["lr"])


class SlowWeights(torch.optim.SGD):
    """Creates its state when it is built, without a step."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=1e-3)
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["slow"] = parameter.detach().clone()

    @torch.no_grad()
    def step(self, closure=None):
        super().step()
        for parameter in self.param_groups[0]["params"]:
            parameter.copy_(self.state[parameter]["slow"].lerp_(parameter, 0.5))


def split(parameters):
    """Return two groups of parameters."""
    parameters = list(parameters)
    return [{"params": parameters[:3]}, {"params": parameters[3:]}]


def several(*classes):
    """Return a function from parameters to an optimizer of the matrices and one of the vectors, in this order."""

    def build(parameters):
        matrices, vectors = matrices_and_vectors(parameters)
        return [optimizer(matrices if optimizer is Muon else vectors, lr=1e-3) for optimizer in classes]

    return build


OPTIMIZERS = {
    "built-in": lambda parameters: None,
    "AdamW amsgrad": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, amsgrad=True),
    "Adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=1e-3),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=1e-3),
    "SGD momentum": lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9),
    "RMSprop momentum": lambda parameters: torch.optim.RMSprop(parameters, lr=1e-3, momentum=0.9),
    "Adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=1e-3),
    "numbers": lambda parameters: NumberState(split(parameters)),
    "slow weights": SlowWeights,
    "muon": lambda parameters: "muon",
    "Muon, AdamW": several(Muon, torch.optim.AdamW),
    "AdamW, Muon": several(torch.optim.AdamW, Muon),
    "Muon, Adagrad": several(Muon, torch.optim.Adagrad),
}


def train(output_dir, name, *, steps, **arguments):
    """Train to a step with an optimizer and a constant schedule; return the Trainer."""
    model = GPT(ONE_LAYER)
    optimizer = OPTIMIZERS[name](model.parameters())
    is_built_in = optimizer is None or isinstance(optimizer, str)
    trainer = make_trainer(
        output_dir,
        model=model,
        optimizer=optimizer,
        schedule=lambda step: 1.0,
        learning_rate=1e-3 if is_built_in else None,
        max_steps=4,
        callbacks=[StopAt(steps)],
        progress=False,
    )
    trainer.train(**arguments)
    return trainer


def describe_state(trainer):
    """Return the keys of the optimizer's state, its step counts, and the plain numbers of its groups."""
    optimizer = trainer.optimizer
    states = {name: optimizer.state.get(parameter, {}) for name, parameter in trainer.model.named_parameters()}
    return (
        {name: sorted(state) for name, state in states.items()},
        {name: float(state["step"]) for name, state in states.items() if "step" in state},
        [group.get("num_calls") for group in optimizer.param_groups],
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return a function from the name of an optimizer to its checkpoint at step 1, and the state there."""
    folder = tmp_path_factory.mktemp("runs")

    @cache
    def run(name):
        trainer = train(folder / name, name, steps=1)
        return checkpoint_path(folder / name, 1), describe_state(trainer)

    return run


NAMES = list(OPTIMIZERS)


@pytest.mark.parametrize(
    ("old", "new"), [*zip(NAMES, NAMES[1:] + NAMES[:1], strict=True), ("AdamW, Muon", "Muon, AdamW")]
)
def test_another_optimizer_starts_without_the_old_state(tmp_path, runs, old, new):
    checkpoint, _ = runs(old)
    _, fresh = runs(new)
    with pytest.warns(UserWarning, match=r"without its optimizer state.*accepted changes: optimizer\."):
        resumed = train(tmp_path, new, steps=2, resume=checkpoint, accept_changes=["optimizer"])
    assert resumed.step == 2
    assert describe_state(resumed) == fresh


def test_an_optimizer_that_has_been_used_starts_without_state(tmp_path, runs):
    model = GPT(ONE_LAYER)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    settings = {"model": model, "optimizer": optimizer, "max_steps": 4}
    make_trainer(tmp_path / "first", **settings).train()
    trainer = make_trainer(tmp_path / "second", **settings)
    with pytest.warns(UserWarning, match="optimizer state"):
        trainer.train(resume=runs("SGD")[0], accept_changes=["optimizer", "schedule"])
    assert {float(state["step"]) for state in optimizer.state.values()} == {3.0}


@pytest.mark.parametrize(("weight_decay", "expected"), [(0.1, 0.5), (0.3, 0.3)])
def test_a_setting_that_the_run_has_changed_is_restored_unless_another_was_accepted(tmp_path, weight_decay, expected):
    class ChangeDecay(Callback):
        def on_step_end(self, trainer):
            optimizer.param_groups[0]["weight_decay"] = 0.5

    for decay, callbacks in ((0.1, [ChangeDecay(), StopAt(2)]), (weight_decay, [])):
        model = GPT(ONE_LAYER)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=decay)
        trainer = make_trainer(tmp_path, model=model, optimizer=optimizer, max_steps=4, callbacks=callbacks)
        trainer.train(resume=True, accept_changes=["optimizer"])
    assert optimizer.param_groups[0]["weight_decay"] == expected


class RecordState(Callback):
    """Copies the optimizer's state at the start."""

    def on_train_begin(self, trainer):
        state = state_tensors(trainer.model, trainer.optimizer)
        self.tensors = {f"optimizer/{name}": value.clone() for name, value in state.items()}


@pytest.mark.parametrize(
    "change",
    [
        {"weight_decay": 0.5},
        {"betas": (0.5, 0.6)},
        {"max_grad_norm": 0.5},
        {"schedule": lambda step: 0.5},
    ],
)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_settings_of_the_same_optimizer_keep_its_state(tmp_path, change, optimizer):
    settings = {"model": ONE_LAYER, "schedule": lambda step: 1.0, "max_steps": 4, "optimizer": optimizer}
    make_trainer(tmp_path, **settings, callbacks=[StopAt(2)]).train()
    saved = {name: value for name, value in checkpoint_tensors(tmp_path, 2).items() if name.startswith("optimizer/")}
    restored = RecordState()
    trainer = make_trainer(tmp_path, **settings | change, callbacks=[restored])
    trainer.train(resume=True, accept_changes=["optimizer", "schedule"])
    assert equal(restored.tensors, saved)


class RecordedDataset(Dataset):
    """Samples of random tokens; `indices` are those read in training."""

    def __init__(self, length=64, seed=1):
        self.rows = random_tokens(length * 17, seed).view(length, 17)
        self.indices = []

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        self.indices.append(index)
        return self.rows[index][:-1], self.rows[index][1:]


class ReadSamples(Callback):
    """Records the indices of the samples that the steps have read. The Trainer reads one step ahead."""

    def on_train_begin(self, trainer):
        trainer.train_dataset.indices.clear()

    def on_step_end(self, trainer):
        self.indices = list(trainer.train_dataset.indices)


def read(output_dir, *, until, dataset=None, batch=8, **settings):
    """Train to a step, and return the indices of the samples read."""
    samples = ReadSamples()
    options = {"model": ONE_LAYER, "max_steps": 20, "global_batch_tokens": batch * 16, "micro_batch_size": 2}
    trainer = make_trainer(
        output_dir,
        train_dataset=dataset or RecordedDataset(),
        callbacks=[samples, StopAt(until)],
        progress=False,
        **options | settings,
    )
    trainer.train(resume=True, accept_changes=["global_batch_size", "dataset", "seed"])
    return samples.indices


@pytest.mark.parametrize("stages", [((2, 16), (6, 8)), ((2, 8), (5, 16)), ((1, 4), (2, 32), (4, 2), (7, 8))])
def test_another_batch_size_continues_the_epoch(tmp_path, stages):
    """Each sample of the epoch is read once, in the order of an uninterrupted run."""
    indices = [index for until, batch in stages for index in read(tmp_path / "run", until=until, batch=batch)]
    expected = read(tmp_path / "expected", until=16, batch=4)
    assert sorted(expected) == list(range(64))
    assert indices == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": RecordedDataset(length=60)}, "data position, loss statistics"),
        ({"seed": 7}, "data position, random states"),
    ],
    ids=["dataset", "seed"],
)
def test_another_dataset_or_seed_starts_a_new_epoch(tmp_path, change, message):
    read(tmp_path / "run", until=3)
    with pytest.warns(UserWarning, match=f"without its {message}") as warned:
        indices = read(tmp_path / "run", until=5, **change)
    assert warned[0].filename == __file__
    expected = read(tmp_path / "expected", until=2, **change)
    assert indices == expected
    indices = read(tmp_path / "run", until=7, **change)  # resumed without a change
    assert indices == read(tmp_path / "expected", until=4, **change)


def test_another_seed_has_other_random_states(tmp_path):
    config = GPTConfig(block_size=16, vocab_size=50, n_layer=1, n_head=1, n_embd=8, dropout=0.5)

    def run(name, **change):
        shutil.copytree(tmp_path / "source", tmp_path / name)
        trainer = make_trainer(tmp_path / name, model=config, schedule=lambda step: 1.0, max_steps=4, **change)
        trainer._loader.steps = lambda first, steps=trainer._loader.steps: steps(0)  # the same samples
        trainer.train(resume=True, accept_changes=["seed"])
        return weights(trainer)

    make_trainer(
        tmp_path / "source", model=config, schedule=lambda step: 1.0, max_steps=4, callbacks=[StopAt(2)]
    ).train()
    same = run("same")
    with pytest.warns(UserWarning, match="random states"):
        other = run("other", seed=43)
    assert not torch.equal(same["transformer.wte.weight"], other["transformer.wte.weight"])


def test_another_dataset_forgets_past_losses(tmp_path):
    """Otherwise the losses of other data would count as spikes."""
    settings = {"max_steps": 8, "loss_spike_zscore": 5.0}
    trainer = make_trainer(tmp_path, **settings, callbacks=[StopAt(3)])
    trainer.train()
    assert trainer._guard.state_dict()["history"][2] == 3
    trainer = make_trainer(tmp_path, **settings, train_dataset=token_dataset(seed=9), callbacks=[StopAt(4)])
    with pytest.warns(UserWarning, match="loss statistics"):
        trainer.train(resume=True, accept_changes=["dataset"])
    assert trainer._guard.state_dict()["history"][2] == 1


def lora(**options):
    model = GPT(ONE_LAYER)
    add_lora(model, LoRAConfig(**options))
    return model


@pytest.mark.parametrize(
    ("old", "new", "fits"),
    [
        (lambda: ONE_LAYER, lambda: GPTConfig(16, 50, 1, 2, 8), True),
        (lambda: ONE_LAYER, lambda: GPTConfig(16, 50, 1, 1, 8, dropout=0.1), True),
        (lambda: lora(alpha=1.0), lambda: lora(alpha=2.0), True),
        (lambda: ONE_LAYER, lambda: GPTConfig(16, 50, 2, 1, 8), False),
        (lambda: ONE_LAYER, lambda: GPTConfig(16, 60, 1, 1, 8), False),
        (lambda: lora(rank=2), lambda: lora(rank=4), False),
        (lambda: ONE_LAYER, lora, False),
        (lora, lambda: ONE_LAYER, False),
    ],
    ids=["n_head", "dropout", "alpha", "n_layer", "vocab_size", "rank", "adapter added", "adapter removed"],
)
def test_another_model_is_accepted_only_if_the_weights_fit(tmp_path, old, new, fits):
    make_trainer(tmp_path, model=old(), max_steps=4, callbacks=[StopAt(2)]).train()
    trainer = make_trainer(tmp_path, model=new(), max_steps=4)
    if fits:
        trainer.train(resume=True, accept_changes=["model", "adapter"])
        assert trainer.step == 4
        return
    with pytest.raises(ResumeMismatch, match="do not fit"):
        trainer.train(resume=True, accept_changes=["model", "adapter", "optimizer", "schedule"])
