"""Muon, several optimizers and the schedules in the Trainer."""

import copy

import pytest
import torch
from custom_optimizers import ScheduleFreeAdamW
from tiny_runs import (
    ONE_LAYER,
    RaiseAt,
    Recorder,
    StopAt,
    checkpoint_tensors,
    equal,
    make_trainer,
    matrices_and_vectors,
    saved_steps,
    token_dataset,
    weights,
)

from homebrew import GPT, Callback, LoRAConfig, Muon, add_lora, load_model
from homebrew.checkpoint.state_dict import checkpoint_bytes
from homebrew.errors import ConfigError, ResumeMismatch, TrainingError


def muon_and_adamw(model, **settings):
    """Return the optimizers that optimizer="muon" builds."""
    blocks = dict(model.transformer.h.named_parameters())
    matrices = {name: parameter for name, parameter in blocks.items() if parameter.dim() == 2}
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices.values())]
    query_key_value = [p for name, p in matrices.items() if "c_attn" in name]
    matrix_groups = [
        {"params": query_key_value, "num_matrices": 3},
        {"params": [p for name, p in matrices.items() if "c_attn" not in name], "num_matrices": 1},
    ]
    groups = [
        {"params": [p for p in others if p.dim() == 2]},
        {"params": [p for p in others if p.dim() == 1], "weight_decay": 0.0},
    ]
    return [
        Muon(matrix_groups, lr=4e-3, adjust_lr_fn="match_rms_adamw", **settings),
        torch.optim.AdamW(groups, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True),
    ]


def test_muon_trains_the_matrices_of_the_blocks_and_adamw_the_rest(tmp_path):
    eager = {"compile": False}  # a CUDA graph computes learning rates in float32
    built_in = make_trainer(tmp_path / "built-in", model=GPT(ONE_LAYER), optimizer="muon", learning_rate=None, **eager)
    built_in.train()
    model = GPT(ONE_LAYER)
    custom = make_trainer(tmp_path / "custom", model=model, optimizer=muon_and_adamw(model), **eager)
    custom.train()
    assert equal(weights(built_in), weights(custom))


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("kind", ["muon", "several"])
def test_resume_is_bitwise_identical(tmp_path, kind):
    def trainer(folder, **settings):
        model = GPT(ONE_LAYER)
        optimizer = "muon" if kind == "muon" else muon_and_adamw(model)
        return make_trainer(tmp_path / folder, model=model, optimizer=optimizer, max_steps=8, **settings)

    uninterrupted = trainer("a")
    uninterrupted.train()
    trainer("b", callbacks=[StopAt(3)]).train()
    resumed = trainer("b")
    resumed.train(resume=True)
    assert equal(weights(uninterrupted), weights(resumed))


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(("mode", "num_graphs"), [("cuda_graphs", 1), ("captured", 2)])
def test_a_run_of_cuda_graphs_follows_the_schedule_and_resumes_bitwise(
    tmp_path, monkeypatch, captured, optimizer, mode, num_graphs
):
    monkeypatch.setattr("homebrew.training.setup.compile_model", lambda *_, **__: mode)

    def train(folder, *callbacks, resume=False, **settings):
        settings |= {"optimizer": optimizer, "max_steps": 9, "micro_batch_size": 4}
        trainer = make_trainer(tmp_path / folder, model=ONE_LAYER, callbacks=callbacks, **settings)
        trainer.train(resume=resume)
        return weights(trainer)

    uninterrupted = train("graph")
    assert len(captured) == num_graphs
    train("stopped", StopAt(5))
    assert equal(train("stopped", resume=True), uninterrupted)
    assert len(captured) == 3 * num_graphs
    constant = train("constant", schedule=lambda step: 1.0)
    monkeypatch.undo()
    eager = train("eager")
    for name, weight in eager.items():
        torch.testing.assert_close(uninterrupted[name], weight, rtol=0, atol=1e-3)  # on a GPU Muon rounds to bfloat16
        assert not torch.allclose(constant[name], weight, rtol=0, atol=5e-3)


def test_the_last_checkpoint_before_the_decay_is_kept(tmp_path):
    settings = {"lr_schedule": "wsd", "decay_fraction": 0.5, "warmup_steps": 0, "save_every": 1, "keep_last": 1}
    make_trainer(tmp_path, max_steps=9, **settings).train()
    assert saved_steps(tmp_path) == [4, 9]


def test_muon_saves_one_momentum_for_each_matrix(tmp_path):
    make_trainer(tmp_path, model=ONE_LAYER, optimizer="muon", max_steps=1).train()
    keys = {}
    for name in checkpoint_tensors(tmp_path, 1):
        file, _, tensor = name.partition("/")
        if file == "optimizer":
            parameter, _, key = tensor.partition("//")
            keys.setdefault(parameter, set()).add(key)
    matrices = {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
    for parameter, saved in keys.items():
        is_matrix = parameter in {f"transformer.h.0.{name}.weight" for name in matrices}
        assert saved == ({"momentum_buffer"} if is_matrix else {"step", "exp_avg", "exp_avg_sq"})
    assert keys.keys() == dict(GPT(ONE_LAYER).named_parameters()).keys()


def test_optimizers_that_lack_or_share_a_parameter_are_an_error(tmp_path):
    model = GPT(ONE_LAYER)
    muon, adamw = muon_and_adamw(model)
    with pytest.raises(ConfigError, match="lacks"):
        make_trainer(tmp_path, model=model, optimizer=[muon])
    with pytest.raises(ConfigError, match="Give each parameter to one optimizer"):
        make_trainer(tmp_path, model=model, optimizer=[muon, adamw, torch.optim.SGD(model.parameters(), lr=0.1)])
    with pytest.raises(ConfigError, match=r"optimizer\[1\] is 3, but must be a torch"):
        make_trainer(tmp_path, model=model, optimizer=[muon, 3])


def test_muon_refuses_lora(tmp_path):
    model = GPT(ONE_LAYER)
    add_lora(model, LoRAConfig())
    with pytest.raises(ConfigError, match="LoRA"):
        make_trainer(tmp_path, model=model, optimizer="muon")


@pytest.mark.parametrize("frozen", ["blocks", "rest"])
def test_muon_with_frozen_parts(tmp_path, frozen):
    model = GPT(ONE_LAYER)
    for name, parameter in model.named_parameters():
        is_matrix = ".h." in name and parameter.dim() == 2
        parameter.requires_grad_(is_matrix == (frozen == "rest"))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    trainer = make_trainer(tmp_path, model=model, optimizer="muon")
    trainer.train()
    changed = {name for name, weight in weights(trainer).items() if not torch.equal(weight, before[name].cpu())}
    assert changed
    assert changed <= {
        name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.requires_grad
    }


def train(folder, max_steps, *callbacks, resume=False, **settings):
    """Train a small model with a stable phase, and return its weights."""
    settings = {"lr_schedule": "wsd", "optimizer": "muon", "model": ONE_LAYER} | settings
    trainer = make_trainer(folder, max_steps=max_steps, callbacks=callbacks, **settings)
    trainer.train(resume=resume)
    return weights(trainer)


@pytest.mark.filterwarnings("ignore:The learning rate does not reach its peak")
@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(
    ("first", "stop", "second", "settings"),
    [
        (20, 10, 40, {}),  # the last half of a run is its decay
        (20, 11, 40, {}),  # step 10 has the full learning rate, too
        (8, 4, 16, {}),  # shorter than the default warm-up
        (8, 4, 16, {"warmup_steps": 6}),
        (6, 6, 12, {"decay_fraction": 0.0}),
        (10, 7, 14, {"decay_fraction": 0.3, "min_lr_ratio": 0.2, "warmup_steps": 0}),
        (40, 5, 12, {}),  # shorter
    ],
)
def test_a_run_can_be_extended_or_shortened_before_its_decay(tmp_path, optimizer, first, stop, second, settings):
    settings = settings | {"optimizer": optimizer}
    expected = train(tmp_path / "uninterrupted", second, **settings)
    train(tmp_path / "stopped", first, StopAt(stop), **settings)
    assert equal(train(tmp_path / "stopped", second, resume=True, **settings), expected)


@pytest.mark.filterwarnings("ignore:The learning rate does not reach its peak")
@pytest.mark.usefixtures("deterministic")
def test_a_run_can_be_extended_several_times(tmp_path):
    train(tmp_path / "run", 4, StopAt(2))
    train(tmp_path / "run", 10, StopAt(5), resume=True)
    train(tmp_path / "run", 20, StopAt(10), resume=True)
    assert equal(train(tmp_path / "run", 16, resume=True), train(tmp_path / "uninterrupted", 16))


@pytest.mark.parametrize(
    ("first", "stop", "second", "settings"),
    [
        (8, 7, 16, {"warmup_steps": 0}),
        (16, 7, 8, {"warmup_steps": 0}),  # has passed the shorter run's decay
        (8, 2, 16, {"lr_schedule": "linear"}),
        (8, 2, 16, {"lr_schedule": "cosine", "warmup_steps": 0}),
    ],
)
def test_another_number_of_steps_is_a_change_after_the_decay_has_begun(tmp_path, first, stop, second, settings):
    train(tmp_path, first, StopAt(stop), **settings)
    with pytest.raises(ResumeMismatch, match=f"max_steps was {first}, is {second}, learning rate at step"):
        train(tmp_path, second, resume=True, **settings)


def test_changing_the_optimizer_is_an_accepted_change(tmp_path):
    make_trainer(tmp_path, model=GPT(ONE_LAYER), max_steps=2, learning_rate=1e-3).train()
    other = {"model": GPT(ONE_LAYER), "max_steps": 4, "learning_rate": 1e-3, "optimizer": "muon"}
    with pytest.raises(ResumeMismatch, match=r"class was 'AdamW', is 'homebrew.Muon and AdamW';"):
        make_trainer(tmp_path, **other).train(resume=True)
    trainer = make_trainer(tmp_path, **other, train_dataset=token_dataset())
    with pytest.warns(UserWarning, match="without its optimizer state"):
        trainer.train(resume=True, accept_changes=["optimizer", "schedule"])
    assert trainer.step == 4


class Averages(Callback):
    """Computes the average of the weights from the weights of each step."""

    def __init__(self, decay):
        self.decay, self.average = decay, None

    def on_step_end(self, trainer):
        new = weights(trainer)
        old = new if self.average is None else self.average
        weight = max(1 - self.decay, 9 / (9 + trainer.step))
        self.average = {name: old[name].lerp(new[name], weight) for name in new}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_average_of_the_weights_is_evaluated_and_saved(tmp_path, optimizer):
    callback, recorder = Averages(0.5), Recorder()
    settings = {"model": GPT(ONE_LAYER), "eval_dataset": token_dataset(seed=1), "optimizer": optimizer}
    trainer = make_trainer(tmp_path, **settings, ema_decay=0.5, max_steps=14, callbacks=[callback, recorder])
    trainer.train()
    saved = load_model(tmp_path)[0].state_dict()
    for name, average in callback.average.items():
        torch.testing.assert_close(saved[name], average)
        torch.testing.assert_close(weights(trainer)[name], average)
    plain = make_trainer(tmp_path / "plain", **settings | {"model": GPT(ONE_LAYER)})
    plain.model.load_state_dict(saved)
    assert trainer.evaluate().loss == pytest.approx(plain.evaluate().loss, abs=1e-6)


@pytest.mark.usefixtures("deterministic")
def test_a_run_with_averaged_weights_resumes_bitwise(tmp_path):
    settings = {"ema_decay": 0.5, "optimizer": "muon", "eval_dataset": token_dataset(seed=1)}
    uninterrupted = make_trainer(tmp_path / "a", model=GPT(ONE_LAYER), **settings)
    uninterrupted.train()
    make_trainer(tmp_path / "b", model=GPT(ONE_LAYER), **settings, callbacks=[StopAt(3)]).train()
    resumed = make_trainer(tmp_path / "b", model=GPT(ONE_LAYER), **settings, eval_every=2)
    resumed.train(resume=True)
    assert equal(weights(uninterrupted), weights(resumed))
    with pytest.raises(ResumeMismatch, match=r"ema_decay was '0.5', is '0.6'\."):
        make_trainer(tmp_path / "b", model=GPT(ONE_LAYER), **settings | {"ema_decay": 0.6}).train(resume=True)


@pytest.mark.parametrize("ema_decay", [None, 0.9])
@pytest.mark.parametrize("is_adapter", [False, True])
def test_checkpoint_bytes_is_the_size_of_the_tensors_of_a_checkpoint(tmp_path, ema_decay, is_adapter):
    model = GPT(ONE_LAYER)
    if is_adapter:
        add_lora(model, LoRAConfig())
    trainer = make_trainer(tmp_path, model=model, max_steps=2, ema_decay=ema_decay)
    trainer.train()
    tensors = checkpoint_tensors(tmp_path, 2)
    saved = [tensor.nbytes for name, tensor in tensors.items() if not name.startswith(("rng", "guard")) and tensor.ndim]
    assert checkpoint_bytes(trainer.model, trainer.optimizer) == sum(saved)


def test_an_optimizer_may_be_used_again_without_averages(tmp_path):
    model = GPT(ONE_LAYER)
    optimizer = adamw(model.parameters())
    make_trainer(tmp_path / "averaged", model=model, optimizer=optimizer, ema_decay=0.5, max_steps=1).train()
    make_trainer(tmp_path / "plain", model=model, optimizer=optimizer, max_steps=1).train()
    other = GPT(ONE_LAYER)
    resumed = make_trainer(tmp_path / "plain", model=other, optimizer=adamw(other.parameters()), max_steps=1)
    resumed.train(resume=True)
    assert equal(weights(resumed), {name: weight.cpu() for name, weight in model.state_dict().items()})


OPTIMIZERS = {
    "adamw": {"optimizer": "adamw"},
    "averaged adamw": {"optimizer": "adamw", "ema_decay": 0.5},
    "averaged muon": {"optimizer": "muon", "ema_decay": 0.5},
    "schedule-free": {"optimizer": ScheduleFreeAdamW},
    "averaged SGD": {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1), "ema_decay": 0.5},
}


def trainer_of(folder, kind, model, *callbacks):
    settings = OPTIMIZERS[kind]
    if callable(settings["optimizer"]):
        settings = settings | {"optimizer": settings["optimizer"](model.parameters())}
    return make_trainer(folder, model=model, callbacks=callbacks, **settings)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("loads", [False, True])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_second_run_of_a_trainer_is_a_new_run_from_the_weights_that_the_model_has(tmp_path, kind, loads):
    trainer = trainer_of(tmp_path / "a", kind, GPT(ONE_LAYER))
    trainer.train()
    if loads:
        trainer.model.load_state_dict(GPT(ONE_LAYER, seed=7).state_dict())
    model = GPT(ONE_LAYER)
    model.load_state_dict(weights(trainer))
    new = trainer_of(tmp_path / "b", kind, model)
    new.train()
    with pytest.warns(UserWarning, match="trained before"):
        trainer.train(overwrite=True)
    assert equal(checkpoint_tensors(tmp_path / "a", 6), checkpoint_tensors(tmp_path / "b", 6))
    assert equal(weights(trainer), weights(new))


@pytest.mark.parametrize("kind", ["averaged adamw", "schedule-free"])
def test_a_run_that_failed_before_its_first_checkpoint_starts_again_from_loaded_weights(tmp_path, kind):
    loaded = GPT(ONE_LAYER, seed=7).state_dict()
    raises = RaiseAt(3, ZeroDivisionError())
    trainer = trainer_of(tmp_path / "a", kind, GPT(ONE_LAYER), raises)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    trainer.callbacks.remove(raises)
    trainer.model.load_state_dict(loaded)
    with pytest.warns(UserWarning, match="trained before"):
        trainer.train(resume=True)
    model = GPT(ONE_LAYER)
    model.load_state_dict(loaded)
    new = trainer_of(tmp_path / "b", kind, model)
    new.train()
    assert equal(weights(trainer), weights(new))


@pytest.mark.filterwarnings("ignore:.*trained before")
@pytest.mark.parametrize("resume", [False, True])
def test_a_setting_that_is_changed_between_two_runs_is_used(tmp_path, resume):
    model = GPT(ONE_LAYER)
    optimizer = ScheduleFreeAdamW(model.parameters())
    trainer = make_trainer(tmp_path, model=model, optimizer=optimizer, schedule=lambda step: 1.0, max_steps=2)
    trainer.train()
    assert optimizer.param_groups[0]["k"] == 2
    optimizer.param_groups[0]["beta"] = 0.8
    trainer.train(resume=resume, overwrite=not resume)
    assert (optimizer.param_groups[0]["beta"], optimizer.param_groups[0]["k"]) == (0.8, 2)


@pytest.mark.parametrize("resume", [False, True])
def test_a_group_that_is_added_between_two_runs_is_an_error(tmp_path, resume):
    model = GPT(ONE_LAYER)
    optimizer = adamw(model.parameters())
    trainer = make_trainer(tmp_path, model=model, optimizer=optimizer, max_steps=2)
    trainer.train()
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    with pytest.raises(TrainingError, match="parameter groups have changed"):
        trainer.train(resume=resume, overwrite=not resume)


@pytest.mark.parametrize("when", ["before the Trainer", "after it"])
def test_an_optimizer_that_is_used_again_does_not_bring_back_earlier_weights(tmp_path, when):
    finished = []
    for folder, has_trained in (("a", True), ("b", False)):
        model = GPT(ONE_LAYER)
        settings = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "ema_decay": 0.5}
        if has_trained:
            make_trainer(tmp_path / "first", **settings).train()
        loaded = GPT(ONE_LAYER, seed=7).state_dict()
        if when == "before the Trainer":
            model.load_state_dict(loaded)
        trainer = make_trainer(tmp_path / folder, **settings)
        if when == "after it":
            model.load_state_dict(loaded)
        trainer.train()
        finished.append(weights(trainer))
    assert equal(*finished)


def adamw(parameters, **settings):
    return torch.optim.AdamW(parameters, lr=1e-2, **settings)


ORDERS = {
    "Muon first": lambda matrices, vectors: [Muon(matrices, lr=1e-2), adamw(vectors)],
    "Muon last": lambda matrices, vectors: [adamw(vectors), Muon(matrices, lr=1e-2)],
    "matrices first": lambda matrices, vectors: [adamw(matrices), adamw(vectors)],
    "vectors first": lambda matrices, vectors: [adamw(vectors), adamw(matrices)],
    "two groups": lambda matrices, vectors: [adamw([{"params": matrices}, {"params": vectors}])],
    "settings": lambda matrices, vectors: [adamw(matrices, weight_decay=0.1), adamw(vectors)],
    "exchanged settings": lambda matrices, vectors: [adamw(matrices), adamw(vectors, weight_decay=0.1)],
}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("Muon first", "Muon last", "class was 'homebrew.Muon and AdamW', is 'AdamW and homebrew.Muon'"),
        ("matrices first", "vectors first", "parameters was"),
        ("matrices first", "two groups", "class was 'AdamW and AdamW', is 'AdamW'"),
        ("settings", "exchanged settings", "weight_decay was '0.1, 0.01', is '0.01, 0.1'"),
    ],
)
def test_another_order_of_the_optimizers_is_another_run(tmp_path, old, new, message):
    def trainer(name):
        model = GPT(ONE_LAYER)
        return make_trainer(tmp_path, model=model, optimizer=ORDERS[name](*matrices_and_vectors(model.parameters())))

    trainer(old).train()
    with pytest.raises(ResumeMismatch, match=message):
        trainer(new).train(resume=True)
    trainer(old).train(resume=True)


@pytest.mark.usefixtures("deterministic")
def test_an_optimizer_of_a_sequence_may_load_its_own_state(tmp_path):
    """The learning rates of the schedule still reach it, and its state is saved."""

    class Reload(Callback):
        def on_step_end(self, trainer):
            if trainer.step == 2:
                for optimizer in optimizers:
                    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    finished = []
    for name, callbacks in (("a", []), ("b", [Reload()])):
        model = GPT(ONE_LAYER)
        optimizers = muon_and_adamw(model)
        make_trainer(tmp_path / name, model=model, optimizer=optimizers, callbacks=callbacks).train()
        finished.append(checkpoint_tensors(tmp_path / name, 6))
    assert equal(*finished)


def test_an_optimizer_of_a_sequence_may_not_get_another_group(tmp_path):
    class AddGroup(Callback):
        def on_step_end(self, trainer):
            muon.add_param_group({"params": [torch.nn.Parameter(torch.ones(2, 2))]})

    model = GPT(ONE_LAYER)
    muon, adamw = muon_and_adamw(model)
    with pytest.raises(TrainingError, match="parameter groups have changed"):
        make_trainer(tmp_path, model=model, optimizer=[muon, adamw], callbacks=[AddGroup()]).train()


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("kind", ["one", "several"])
def test_the_weights_of_custom_optimizers_are_averaged(tmp_path, kind):
    def trainer(folder, *callbacks, **settings):
        model = GPT(ONE_LAYER)
        optimizer = adamw(model.parameters()) if kind == "one" else muon_and_adamw(model)
        return make_trainer(tmp_path / folder, model=model, optimizer=optimizer, callbacks=callbacks, **settings)

    runs = {"plain": {}, "averaged": {"ema_decay": 0.9}, "resumed": {"ema_decay": 0.9}}
    trainer("resumed", StopAt(3), ema_decay=0.9).train()
    finished = {}
    for name, settings in runs.items():
        run = trainer(name, **settings)
        run.train(resume=True)
        finished[name] = weights(run)
    assert not equal(finished["plain"], finished["averaged"])
    assert equal(finished["resumed"], finished["averaged"])


@pytest.mark.parametrize("several", [False, True])
def test_an_optimizer_that_averages_the_weights_itself_refuses_ema_decay(tmp_path, several):
    model = GPT(ONE_LAYER)
    first, *others = model.parameters()
    optimizer = [adamw([first]), ScheduleFreeAdamW(others)] if several else ScheduleFreeAdamW([first, *others])
    with pytest.raises(ConfigError, match=r"ScheduleFreeAdamW.*ema_decay"):
        make_trainer(tmp_path, model=model, optimizer=optimizer, ema_decay=0.9)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_error_in_the_first_step_is_not_hidden_by_averaging(tmp_path, optimizer):
    """No parameter has optimizer state yet."""

    def fail(*_):
        raise ValueError("the first batch")

    trainer = make_trainer(tmp_path, model=ONE_LAYER, optimizer=optimizer, ema_decay=0.5)
    trainer.model.register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="the first batch"):
        trainer.train()


def test_frozen_parameters_of_an_optimizer_are_not_averaged(tmp_path):
    model = GPT(ONE_LAYER)
    frozen = model.transformer.wpe.weight.requires_grad_(False)
    before = frozen.detach().cpu().clone()
    optimizer = adamw(model.parameters())
    eval_dataset = token_dataset(seed=1)
    make_trainer(tmp_path, model=model, optimizer=optimizer, ema_decay=0.5, eval_dataset=eval_dataset).train()
    assert torch.equal(frozen.cpu(), before)


def test_a_skipped_first_step_can_be_evaluated_with_averaged_weights(tmp_path):
    """An optimizer that is not fused is not called for a skipped step, so it has no state."""

    class Poison(Callback):
        def on_train_begin(self, trainer):
            self.hook = poisoned.register_hook(lambda gradient: gradient * torch.nan)

        def on_step_end(self, trainer):
            self.hook.remove()

    model = GPT(ONE_LAYER)
    poisoned = model.transformer.wpe.weight
    settings = {"ema_decay": 0.5, "non_finite": "skip", "eval_dataset": token_dataset(seed=1), "eval_every": 1}
    optimizer, recorder = torch.optim.SGD(model.parameters(), lr=0.1), Recorder()
    make_trainer(tmp_path, model=model, optimizer=optimizer, callbacks=[Poison(), recorder], **settings).train()
    assert [skipped.step for skipped in recorder.skipped] == [1]
    assert list(recorder.evaluations) == [1, 2, 3, 4, 5, 6]
