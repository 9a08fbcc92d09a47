"""Optimizers with modes, learning rates in tensors, and state that a checkpoint cannot hold."""

import warnings

import pytest
import torch
from custom_optimizers import AdamW8bit, ScheduleFreeAdamW
from tiny_runs import ONE_LAYER, RaiseAt, Recorder, StopAt, checkpoint_path, equal, make_trainer, token_dataset, weights

from homebrew import GPT, load_model
from homebrew.callbacks.base import Callback
from homebrew.errors import ConfigError
from homebrew.training.optimizer_modes import OptimizerModes


def make(output_dir, *callbacks, optimizer=ScheduleFreeAdamW, **config):
    model = GPT(ONE_LAYER)
    optimizer = optimizer(model.parameters())
    return make_trainer(output_dir, model=model, optimizer=optimizer, callbacks=callbacks, **config)


class Evaluate(Callback):
    """Evaluates, saves and samples wherever a callback can, and records the weights that the events see."""

    def __init__(self):
        self.seen = []

    def on_train_begin(self, trainer):
        trainer.evaluate(trainer.train_dataset)
        trainer.save()

    def on_step_end(self, trainer):
        self.on_train_begin(trainer)

    def on_save(self, trainer, path):
        trainer.evaluate(trainer.train_dataset)
        self.seen.append(weights(trainer))


@pytest.mark.usefixtures("deterministic")
def test_a_schedule_free_run_resumes_bitwise_and_reading_does_not_change_it(tmp_path):
    uninterrupted = make(tmp_path / "uninterrupted")
    uninterrupted.train()
    expected = weights(uninterrupted)
    make(tmp_path / "stopped", StopAt(3)).train()
    resumed = make(tmp_path / "stopped")
    resumed.train(resume=True)
    assert equal(weights(resumed), expected)
    read = make(tmp_path / "read", Evaluate())
    read.train()
    assert equal(weights(read), expected)


@pytest.mark.usefixtures("deterministic")
def test_an_interrupted_schedule_free_run_can_be_resumed_by_the_same_trainer(tmp_path):
    uninterrupted = make(tmp_path / "uninterrupted")
    uninterrupted.train()
    raised = RaiseAt(5, ZeroDivisionError())
    trainer = make(tmp_path / "interrupted", raised, save_every=2)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    trainer.callbacks.remove(raised)
    trainer.train(resume=True)
    assert equal(weights(trainer), weights(uninterrupted))


def test_evaluation_checkpoints_samples_and_events_use_the_weights_of_evaluation_mode(tmp_path):
    recorder, evaluate = Recorder(), Evaluate()
    dataset = token_dataset(200, seed=5)
    trainer = make(tmp_path, recorder, evaluate, eval_dataset=dataset, eval_every=3, keep_last=10)
    trainer.train()
    for step in range(7):
        path = checkpoint_path(tmp_path, step)
        assert equal(load_model(path)[0].state_dict(), evaluate.seen[step])
    manual = GPT(ONE_LAYER)
    optimizer = ScheduleFreeAdamW(manual.parameters())
    for step, loss in recorder.evaluations.items():
        manual.load_state_dict(evaluate.seen[step])
        other = make_trainer(tmp_path / f"other-{step}", model=manual, optimizer=optimizer)
        assert other.evaluate(dataset).loss == pytest.approx(loss.loss, abs=1e-6)
    assert equal(weights(trainer), evaluate.seen[6])
    assert not trainer.optimizer.param_groups[0]["train_mode"]


def test_the_modes_differ_and_return_to_the_same_bits():
    parameter = torch.nn.Parameter(torch.randn(50, generator=torch.Generator().manual_seed(1)))
    optimizer = ScheduleFreeAdamW([parameter])
    modes = OptimizerModes(optimizer)
    modes.train()
    for _ in range(3):
        parameter.grad = parameter.detach().square()
        optimizer.step()
    before = parameter.detach().clone()
    with modes.evaluating(), modes.evaluating():
        assert not parameter.equal(before)
    assert parameter.equal(before)
    assert optimizer.state[parameter].keys() == {"z", "exp_avg_sq"}


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda parameters: AdamW8bit(parameters, min_elements=10**9),
        lambda parameters: torch.optim.AdamW(parameters, lr=torch.tensor(1e-2), foreach=False),
        lambda parameters: torch.optim.SGD([{"params": list(parameters), "lr": torch.tensor(0.5)}], foreach=False),
    ],
    ids=["AdamW8bit", "AdamW", "group"],
)
def test_a_learning_rate_in_a_tensor_stays_the_same_tensor(tmp_path, optimizer):
    class Record(Callback):
        def on_step_end(self, trainer):
            group = trainer.optimizer.param_groups[0]
            assert group["lr"] is learning_rate
            used.append(float(group["lr"]))

    used = []
    trainer = make(tmp_path / "a", Record(), optimizer=optimizer, schedule=lambda step: 1 / (1 + step), max_steps=3)
    learning_rate = trainer.optimizer.param_groups[0]["lr"]
    peak = float(learning_rate)
    trainer.train()
    assert used == pytest.approx([peak, peak / 2, peak / 3])
    assert float(learning_rate) == pytest.approx(peak)
    make(tmp_path / "b", StopAt(2), optimizer=optimizer).train()
    resumed = make(tmp_path / "b", optimizer=optimizer)
    resumed.train(resume=True)
    assert isinstance(resumed.optimizer.param_groups[0]["lr"], torch.Tensor)


class ListState(torch.optim.SGD):
    """Keeps its moments in a list, and only of matrices."""

    def step(self, closure=None):
        super().step()
        for parameter in self.param_groups[0]["params"]:
            if parameter.dim() == 2:
                self.state[parameter]["moments"] = [torch.zeros(1)]


class Wrapper(torch.optim.Optimizer):
    """Changes the updates of an inner optimizer, whose state is not its own."""

    def __init__(self, parameters):
        parameters = list(parameters)
        super().__init__(parameters, {"lr": 0.1})
        self.inner = torch.optim.AdamW(parameters)

    def step(self, closure=None):
        self.inner.step()


class Offloaded(Wrapper):
    """Has one inner optimizer for each parameter."""

    def __init__(self, parameters):
        super().__init__(parameters)
        del self.inner
        self.optimizers = {p: torch.optim.AdamW([p]) for p in self.param_groups[0]["params"]}

    def step(self, closure=None):
        for optimizer in self.optimizers.values():
            optimizer.step()


class InitialState(torch.optim.SGD):
    """Creates its state when it is built."""

    def __init__(self, parameters):
        super().__init__(parameters)
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["factors"] = {"rows": torch.zeros(1)}


def keeps(name, key, value):
    """Return an optimizer class whose state has this key and value."""

    def step(self, closure=None):
        torch.optim.SGD.step(self)
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter][key] = value()

    return type(name, (torch.optim.SGD,), {"step": step})


def quantized():
    with warnings.catch_warnings(action="ignore"):  # deprecated
        return torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8)


REFUSED = [
    (AdamW8bit, "exp_avg.*Quantized"),
    (ListState, "moments.*list"),
    (Wrapper, "inner"),
    (InitialState, "factors"),
    (keeps("Int8", "codes", quantized), "codes.*qint8"),
    (keeps("Counter", "count", lambda: torch.zeros(3, dtype=torch.uint64)), "count.*uint64"),
    (keeps("Sparse", "rows", lambda: torch.eye(3).to_sparse()), "rows.*sparse"),
    (keeps("Offloaded", "moment", lambda: torch.zeros(3, device="meta")), "moment.*without values"),
    (keeps("Numbered", 0, lambda: torch.zeros(3)), "key 0"),
    (keeps("Tuples", ("a", 1), lambda: 1.0), "key.*'a', 1"),
    (keeps("Surrogate", "\udc80", lambda: 1.0), "key.*udc80"),
]


@pytest.mark.parametrize(("optimizer", "message"), REFUSED, ids=[optimizer.__name__ for optimizer, _ in REFUSED])
def test_state_that_cannot_be_saved_is_refused_in_the_first_step(tmp_path, optimizer, message):
    recorder = Recorder()
    trainer = make(tmp_path, recorder, optimizer=optimizer)
    with pytest.raises(ConfigError, match=rf"{optimizer.__name__}.*{message}"):
        trainer.train()
    assert trainer.step == 0
    with pytest.raises(ConfigError, match=message):
        trainer.save()
    assert not list((tmp_path / "checkpoints").glob("step-*"))
    make(tmp_path, max_steps=1).train()  # the folder can be used by a run with another optimizer


def test_state_of_a_later_step_that_cannot_be_saved_is_refused_when_it_is_saved(tmp_path):
    class Late(torch.optim.SGD):
        num_steps = 0

        def step(self, closure=None):
            super().step()
            self.num_steps += 1
            if self.num_steps == 2:
                self.state[self.param_groups[0]["params"][0]]["moments"] = [torch.zeros(1)]

    with pytest.raises(ConfigError, match=r"Late.*moments"):
        make(tmp_path, optimizer=Late).train()
