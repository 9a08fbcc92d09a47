"""Custom optimizers: skipped steps, learning rates, schedulers and parameter groups."""

import math

import pytest
import torch
from tiny_runs import ONE_LAYER, Recorder, StopAt, equal, make_trainer, matrices_and_vectors, token_dataset, weights
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, StepLR

from homebrew import GPT, Muon
from homebrew.callbacks.base import Callback
from homebrew.errors import ConfigError, TrainingError
from homebrew.optim.combined import combine
from homebrew.training.nan_guard import NanGuard


class OnStep(Callback):
    """Calls a function without arguments at the end of a step."""

    def __init__(self, step, function):
        self.step, self.function = step, function

    def on_step_end(self, trainer):
        if trainer.step == self.step:
            self.function()


@pytest.fixture
def uninitialized(monkeypatch):
    """Fill new tensors with large values in place of what the memory happens to hold."""
    monkeypatch.setattr(torch, "empty_like", lambda tensor, **options: torch.full_like(tensor, 1e6, **options))


def muon_and_adamw(parameters):
    matrices, others = matrices_and_vectors(parameters)
    return [Muon(matrices, lr=0.01), torch.optim.AdamW(others, lr=0.01, fused=True)]


FUSED = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9, fused=True),
    "Nesterov": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9, nesterov=True, fused=True),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, fused=True),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, amsgrad=True, fused=True),
    "Adagrad": lambda parameters: torch.optim.Adagrad(  # PyTorch 2.11 has no such kernel for GPUs
        parameters, lr=0.01, fused=not torch.cuda.is_available()
    ),
    "one group": lambda parameters: torch.optim.AdamW([{"params": parameters, "fused": False}], lr=0.01, fused=True),
    "other group": lambda parameters: torch.optim.AdamW([{"params": parameters, "fused": True}], lr=0.01),
    "Muon": muon_and_adamw,
}


@pytest.mark.usefixtures("uninitialized")
@pytest.mark.parametrize("name", FUSED)
def test_a_skipped_first_step_has_no_effect_on_later_ones(tmp_path, name):
    model = GPT(ONE_LAYER)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    factors = iter([math.nan] + 99 * [1.0])
    model.lm_head.weight.register_hook(lambda grad: grad * next(factors))
    trainer = make_trainer(
        tmp_path, model=model, optimizer=FUSED[name](model.parameters()), non_finite="skip", compile=False
    )
    trainer.train()
    after = weights(trainer)
    assert not equal(before, after)
    assert max((after[name] - before[name].cpu()).abs().max() for name in before) < 0.2


@pytest.mark.usefixtures("uninitialized")
@pytest.mark.parametrize("name", FUSED)
def test_a_step_skipped_by_a_gradient_scaler_has_no_effect_on_later_ones(name):
    parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in ((3,), (2, 2))]
    optimizer = FUSED[name](parameters)
    optimizer = combine(optimizer) if isinstance(optimizer, list) else optimizer
    NanGuard(optimizer, "skip", 10, torch.device("cpu"))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(torch.ones(()))  # the scale is created here
    for gradient in (math.inf, 1.0):
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, gradient)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert all(0 < (1 - parameter).abs().max() < 0.1 for parameter in parameters)


CHANGES = {
    "begin": ("on_train_begin", lambda trainer, scheduler: trainer.optimizer.param_groups[0].update(lr=0.5)),
    "step": ("on_step_end", lambda trainer, scheduler: scheduler.step()),
    "evaluation": ("on_evaluate", lambda trainer, scheduler: trainer.optimizer.param_groups[-1].update(lr=0.5)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_learning_rate_that_a_callback_sets_is_replaced_with_a_warning(tmp_path, name):
    event, change = CHANGES[name]
    callback, recorder, model = Callback(), Recorder(), GPT(ONE_LAYER)
    optimizers = [torch.optim.SGD([parameter], lr=0.1) for parameter in model.parameters()]
    scheduler = StepLR(optimizers[0], 1)
    setattr(callback, event, lambda trainer, *_: change(trainer, scheduler))
    settings = {"optimizer": optimizers, "schedule": lambda step: 0.5, "eval_dataset": token_dataset(200)}
    trainer = make_trainer(tmp_path, model=model, callbacks=[callback, recorder], eval_every=3, **settings)
    with pytest.warns(UserWarning, match=r"learning rate.*schedule"):
        trainer.train()
    assert {metrics.learning_rate for metrics in recorder.metrics.values()} == {0.05}


SCHEDULERS = {
    "LambdaLR": lambda optimizer: LambdaLR(optimizer, lambda step: 1.0),
    "StepLR": lambda optimizer: StepLR(optimizer, 2),
    "CosineAnnealingLR": lambda optimizer: CosineAnnealingLR(optimizer, 4),
    "OneCycleLR": lambda optimizer: OneCycleLR(optimizer, 0.1, total_steps=4),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_an_optimizer_with_a_scheduler_trains_and_the_scheduler_is_refused_as_the_schedule(tmp_path, name):
    model = GPT(ONE_LAYER)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = SCHEDULERS[name](optimizer)
    with pytest.raises(ConfigError, match=r"schedule is .* must be a function from the step"):
        make_trainer(tmp_path, model=model, optimizer=optimizer, schedule=scheduler)
    trainer = make_trainer(tmp_path, model=model, optimizer=optimizer, max_steps=1)
    before = weights(trainer)
    trainer.train()
    assert not equal(before, weights(trainer))


def test_a_learning_rate_of_zero_in_all_groups_is_an_error(tmp_path):
    """A scheduler with a warm-up sets it when it is built."""
    model = GPT(ONE_LAYER)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    LambdaLR(optimizer, lambda step: step / 10)
    with pytest.raises(ConfigError, match="lr=0"):
        make_trainer(tmp_path, model=model, optimizer=optimizer)


@pytest.mark.filterwarnings("ignore:.*step 0:UserWarning")
def test_the_schedule_multiplies_the_learning_rates_at_the_start_of_train(tmp_path):
    model, recorder = GPT(ONE_LAYER), Recorder()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = {"callbacks": [recorder], "schedule": lambda step: 0.5, "max_steps": 4}
    trainer = make_trainer(tmp_path, model=model, optimizer=optimizer, **settings)
    for learning_rate in (0.2, 0.4):
        optimizer.param_groups[0]["lr"] = learning_rate
        trainer.train(overwrite=True)
        assert optimizer.param_groups[0]["lr"] == learning_rate
        assert {metrics.learning_rate for metrics in recorder.metrics.values()} == {learning_rate / 2}


def add_group(model, optimizer):
    model.get_parameter("transformer.wpe.weight").requires_grad_(True)
    optimizer.add_param_group({"params": [model.transformer.wpe.weight]})


GROUP_CHANGES = {
    "added": add_group,
    "removed": lambda model, optimizer: optimizer.param_groups.pop(),
    "cleared": lambda model, optimizer: optimizer.param_groups[0]["params"].clear(),
    "replaced": lambda model, optimizer: optimizer.param_groups[0].update(params=[torch.nn.Parameter(torch.ones(1))]),
    "moved": lambda model, optimizer: optimizer.param_groups[1]["params"].append(
        optimizer.param_groups[0]["params"].pop()
    ),
}


@pytest.mark.parametrize("step", [0, 2, 6])
@pytest.mark.parametrize("name", GROUP_CHANGES)
def test_changed_parameter_groups_are_an_error(tmp_path, name, step):
    model = GPT(ONE_LAYER)
    model.transformer.wpe.weight.requires_grad_(False)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW([{"params": parameters[:1]}, {"params": parameters[1:]}], lr=1e-2)
    callback = OnStep(step, lambda: GROUP_CHANGES[name](model, optimizer))
    trainer = make_trainer(tmp_path, model=model, optimizer=optimizer, callbacks=[callback])
    if step == 0:
        callback.function()
    with pytest.raises(TrainingError, match="parameter groups have changed"):
        trainer.train()
    assert trainer.step == step


def test_a_callback_may_load_the_state_of_the_optimizer(tmp_path):
    model = GPT(ONE_LAYER)
    optimizer = torch.optim.AdamW([{"params": [parameter]} for parameter in model.parameters()], lr=1e-2)
    callback = OnStep(2, lambda: optimizer.load_state_dict(optimizer.state_dict()))
    make_trainer(tmp_path, model=model, optimizer=optimizer, callbacks=[callback]).train()


class HiddenState(torch.optim.SGD):
    def step(self, closure=None):
        super().step()
        self.param_groups[0]["history"] = [1]


def test_the_warning_about_state_that_is_not_saved_names_the_optimizer(tmp_path):
    model = GPT(ONE_LAYER)
    first, *others = model.parameters()
    optimizers = [torch.optim.SGD([first], lr=0.1), HiddenState(others, lr=0.1)]
    with pytest.warns(UserWarning, match=r"do not contain history of SGD and HiddenState"):
        make_trainer(tmp_path, model=model, optimizer=optimizers, max_steps=1).train()


class Fails(torch.optim.SGD):
    def step(self, closure=None):
        raise self.error


@pytest.mark.parametrize("error", [KeyError("exp_avg"), RuntimeError("2D only"), StopIteration(), ValueError("x")])
@pytest.mark.parametrize("is_alone", [True, False])
def test_every_error_of_an_optimizer_names_it(tmp_path, error, is_alone):
    model = GPT(ONE_LAYER)
    first, *others = model.parameters()
    optimizer = Fails([first, *others] if is_alone else others, lr=0.1)
    optimizer.error = error
    optimizers = optimizer if is_alone else [torch.optim.SGD([first], lr=0.1), optimizer]
    with pytest.raises(TrainingError, match=r"Fails\.step\(\) failed") as raised:
        make_trainer(tmp_path, model=model, optimizer=optimizers).train()
    assert raised.value.__cause__ is error


def test_a_fused_momentum_that_pytorch_cannot_start_later_is_named(tmp_path):
    model = GPT(ONE_LAYER)
    frozen = model.transformer.wpe.weight.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
    callbacks = [OnStep(2, lambda: frozen.requires_grad_(True)), StopAt(4)]
    with pytest.raises(TrainingError, match=r"SGD\.step\(\) failed.*fused=False"):
        make_trainer(tmp_path, model=model, optimizer=optimizer, callbacks=callbacks).train()
