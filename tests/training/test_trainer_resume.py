"""Resuming a run: bitwise identical continuation, and what is compared before."""

import hashlib
import json
import shutil
from dataclasses import replace

import pytest
import torch
from custom_optimizers import ScheduleFreeAdamW
from safetensors.torch import load_file, save_file
from tiny_runs import (
    CONFIG,
    ONE_LAYER,
    RaiseAt,
    Recorder,
    StopAt,
    checkpoint_path,
    checkpoint_tensors,
    equal,
    make_trainer,
    matrices_and_vectors,
    saved_steps,
    token_dataset,
    weights,
)

from homebrew import GPT, GPTConfig, Muon
from homebrew.callbacks.base import Callback
from homebrew.checkpoint.store import CheckpointStore
from homebrew.errors import CheckpointError, ConfigError, CorruptCheckpoint, ResumeMismatch


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("optimizer", [{}, {"optimizer": "muon"}, {"optimizer": "muon", "ema_decay": 0.9}])
def test_resume_is_bitwise_identical(tmp_path, optimizer):
    """Nine steps equal k steps, a resume and 9 - k steps: weights, optimizer and random states."""
    config = GPTConfig(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=16, dropout=0.1)
    dataset = token_dataset(44 * 16 + 1)  # 44 samples, 8 per step: the epoch ends within step 6
    settings = {"model": config, "train_dataset": dataset, "max_steps": 9} | optimizer
    uninterrupted = make_trainer(tmp_path / "uninterrupted", **settings, eval_dataset=token_dataset(200), eval_every=2)
    uninterrupted.train()
    expected = checkpoint_tensors(tmp_path / "uninterrupted", 9)
    for k in (1, 5, 8):
        output_dir = tmp_path / f"stopped-after-{k}"
        stopped = make_trainer(output_dir, **settings, callbacks=[StopAt(k)])
        stopped.train()
        assert stopped.step == k
        torch.manual_seed(999)
        resumed = make_trainer(output_dir, **settings)
        resumed.train(resume=True)
        assert resumed.step == 9
        assert equal(checkpoint_tensors(output_dir, 9), expected)


class PlainNumberState(torch.optim.Optimizer):
    """Keeps Python numbers in its state and its parameter groups, as many custom optimizers do."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1, "num_calls": 0, "distance": 1e-6})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["num_calls"] += 1
            group["distance"] *= 1.7
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state |= {"step": 0, "decay": 0.5, "is_odd": False, "moment": torch.zeros_like(parameter)}
                state["step"] += 1
                state["decay"] *= 0.9
                state["is_odd"] = not state["is_odd"]
                state["moment"].lerp_(parameter.grad, state["decay"])
                scale = group["lr"] * (1 + group["distance"] + state["is_odd"]) / (state["step"] + group["num_calls"])
                parameter.sub_(state["moment"], alpha=scale)


class OwnDtypes(torch.optim.Optimizer):
    """Keeps a bfloat16 moment and a count per element, and state of matrices only."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            update = parameter.grad
            if parameter.dim() == 2:
                state = self.state[parameter]
                if not state:
                    state["moment"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
                    state["count"] = torch.zeros(len(parameter), 1, dtype=torch.int64, device=parameter.device)
                state["moment"].lerp_(parameter.grad.bfloat16(), 0.1)
                state["count"] += parameter.grad.abs().amax(1, keepdim=True) > 1e-3
                update = state["moment"].float() / (1 + state["count"])
            parameter.sub_(update, alpha=self.param_groups[0]["lr"])


def several(first, second):
    """Return a function from parameters to two optimizers, the first of the matrices."""

    def build(parameters):
        matrices, vectors = matrices_and_vectors(parameters)
        return [first(matrices), second(vectors)]

    return build


def fused_adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2, fused=True)


OPTIMIZERS = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, fused=True),
    "AMSGrad": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, amsgrad=True, foreach=False),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, weight_decay=0.1),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "Adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=1e-2),  # has state before its first step
    "NAdam": lambda parameters: torch.optim.NAdam(parameters, lr=1e-2),
    "ASGD": lambda parameters: torch.optim.ASGD(parameters, lr=1e-1),
    "Adafactor": torch.optim.Adafactor,
    "plain numbers": PlainNumberState,
    "own dtypes": OwnDtypes,
    "Muon": several(Muon, fused_adamw),
    "Muon of PyTorch": several(torch.optim.Muon, torch.optim.SGD),
    "Muon and Adagrad": several(Muon, torch.optim.Adagrad),
    "Muon and plain numbers": several(Muon, PlainNumberState),
    "own dtypes and fused": several(OwnDtypes, fused_adamw),
    "plain numbers and schedule-free": several(PlainNumberState, ScheduleFreeAdamW),
    "schedule-free and fused": several(ScheduleFreeAdamW, fused_adamw),
}


def train_with(output_dir, optimizer, *callbacks, resume=True):
    model = GPT(ONE_LAYER)
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    trainer = make_trainer(output_dir, model=model, optimizer=optimizer, callbacks=callbacks, keep_last=100)
    trainer.train(resume=resume)
    return weights(trainer)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resume_with_a_custom_optimizer_is_bitwise_identical(tmp_path, optimizer):
    uninterrupted = train_with(tmp_path / "uninterrupted", optimizer)
    train_with(tmp_path / "stopped", optimizer, StopAt(3))
    assert equal(train_with(tmp_path / "stopped", optimizer), uninterrupted)


class ReadEverything(Callback):
    """Saves, samples, evaluates and gathers the model, before the first step and after some."""

    def on_train_begin(self, trainer):
        trainer.save()
        trainer.evaluate(trainer.train_dataset)
        trainer.full_model().generate([[1, 2]], 2, seed=1)

    def on_step_end(self, trainer):
        if trainer.step % 2:
            self.on_train_begin(trainer)


SOME_OPTIMIZERS = ["AdamW", "Adagrad", "plain numbers", "own dtypes", "Muon", "schedule-free and fused"]


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("optimizer", SOME_OPTIMIZERS)
def test_reading_the_state_does_not_change_it(tmp_path, optimizer):
    expected = train_with(tmp_path / "not read", optimizer)
    assert equal(train_with(tmp_path / "read", optimizer, ReadEverything()), expected)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("optimizer", SOME_OPTIMIZERS)
def test_a_checkpoint_of_step_0_is_the_state_before_training(tmp_path, optimizer):
    expected = train_with(tmp_path / "run", optimizer, ReadEverything())
    assert equal(train_with(tmp_path / "resumed", optimizer, resume=checkpoint_path(tmp_path / "run", 0)), expected)


def test_frozen_weights_are_restored(tmp_path):
    first, second = (GPT(CONFIG, seed=seed) for seed in (1, 2))
    for model in (first, second):
        model.transformer.wpe.requires_grad_(False)
        make_trainer(tmp_path, model=model, max_steps=2).train(resume=True)
    assert equal(first.state_dict(), second.state_dict())


def test_optimizer_of_a_finished_run_trains_on_with_its_peak_learning_rate(tmp_path):
    model = GPT(ONE_LAYER)
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(1e-3), amsgrad=True, foreach=False)
    make_trainer(tmp_path, model=model, optimizer=optimizer).train()
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(1e-3)
    trainer = make_trainer(tmp_path, model=model, optimizer=optimizer, max_steps=8)
    trainer.train(resume=True, accept_changes=["schedule"])
    assert trainer.step == 8


@pytest.mark.usefixtures("deterministic")
def test_a_step_that_raised_leaves_nothing_for_the_next_run(tmp_path):
    make_trainer(tmp_path / "source", max_steps=4).train()
    runs = []
    for is_interrupted in (False, True):
        trainer = make_trainer(tmp_path / str(is_interrupted), micro_batch_size=4)
        if is_interrupted:
            calls = []

            def fail_in_second_micro_batch(*_, calls=calls):
                calls.append(1)
                if len(calls) == 2:
                    raise ZeroDivisionError

            hook = trainer.model.register_forward_hook(fail_in_second_micro_batch)
            with pytest.raises(ZeroDivisionError):
                trainer.train()
            hook.remove()
        trainer.train(resume=checkpoint_path(tmp_path / "source", 4), accept_changes=["schedule"])
        runs.append(weights(trainer))
    assert equal(*runs)


def test_resume_without_a_checkpoint_warns_and_starts_at_step_0(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, callbacks=[RaiseAt(3, KeyboardInterrupt())]).train()
    recorder = Recorder()
    with pytest.warns(UserWarning, match="no checkpoint") as warned:
        make_trainer(tmp_path, callbacks=[recorder]).train(resume=True)
    assert warned[0].filename == __file__
    assert min(recorder.losses) == 1


def test_resume_from_a_run_folder_is_an_error(tmp_path):
    make_trainer(tmp_path, max_steps=1).train()
    with pytest.raises(ConfigError, match="resume=True"):
        make_trainer(tmp_path, max_steps=1).train(resume=tmp_path)


NO_CHECKPOINTS = {
    "nope": "does not exist",
    "a/b/c": "does not exist",
    "run/checkpoints/step-00000009": "does not exist",
    "run/checkpoints": "is not a checkpoint",
    "file": "is not a checkpoint",
    "empty": "is not a checkpoint",
    "link": "is not a checkpoint",
}


@pytest.mark.parametrize("name", NO_CHECKPOINTS)
def test_a_path_without_a_checkpoint_is_not_called_corrupt(tmp_path, name):
    make_trainer(tmp_path / "run", save_every=2, max_steps=3).train()
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for run, newest in (("new", ""), ("run", ".*step-00000003")):
        with pytest.raises(CheckpointError, match=f"{name}' {NO_CHECKPOINTS[name]}.*resume=True{newest}") as caught:
            make_trainer(tmp_path / run).train(resume=tmp_path / name)
        assert not isinstance(caught.value, CorruptCheckpoint)


def test_resume_from_an_older_checkpoint_needs_another_output_dir(tmp_path):
    make_trainer(tmp_path, save_every=2, keep_every=2).train()
    old = checkpoint_path(tmp_path, 2)
    for source in (old, shutil.copytree(old, tmp_path / "copy" / old.name)):
        with pytest.raises(ConfigError, match=r"step-00000006.*another output_dir"):
            make_trainer(tmp_path).train(resume=source)

    make_trainer(tmp_path / "branch", max_steps=2).train(resume=old, accept_changes=["schedule"])
    assert saved_steps(tmp_path / "branch") == [2]


CHANGES = {
    "dataset": {"train_dataset": token_dataset(seed=9)},
    "schedule": {"learning_rate": 2e-2},
    "optimizer": {"max_grad_norm": 0.5},
    "global_batch_size": {"global_batch_tokens": 16 * 16},
    "seed": {"seed": 1},
}


@pytest.mark.filterwarnings("ignore:.*is resumed without its")
@pytest.mark.parametrize("aspect", CHANGES)
def test_a_changed_run_is_resumed_only_if_the_change_is_accepted(tmp_path, aspect):
    make_trainer(tmp_path, max_steps=4, callbacks=[StopAt(2)]).train()
    trainer = make_trainer(tmp_path, max_steps=4, **CHANGES[aspect])
    with pytest.raises(ResumeMismatch, match=rf"(?s){aspect}: .*accept_changes=\('{aspect}',\)"):
        trainer.train(resume=True)
    trainer.train(resume=True, accept_changes=[aspect])
    assert trainer.step == 4


def test_more_steps_are_named_as_a_change_of_the_schedule(tmp_path):
    make_trainer(tmp_path, max_steps=2).train()
    longer = make_trainer(tmp_path, max_steps=4)
    with pytest.raises(ResumeMismatch, match="schedule: max_steps was 2, is 4, learning rate at step 1 was"):
        longer.train(resume=True)
    longer.train(resume=True, accept_changes=["schedule"])
    assert longer.step == 4


@pytest.mark.parametrize("accepted", [(), ("schedule",)])
def test_a_run_is_not_resumed_beyond_its_last_step(tmp_path, accepted):
    make_trainer(tmp_path, max_steps=4).train()
    record = (tmp_path / "run.json").read_text()
    trainer = make_trainer(tmp_path, max_steps=2)
    before = weights(trainer)
    with pytest.raises(ConfigError, match=r"max_steps=2.* step 4"):
        trainer.train(resume=True, accept_changes=accepted)
    assert (tmp_path / "run.json").read_text() == record
    assert trainer.step == 0
    assert equal(weights(trainer), before)


def test_another_precision_or_world_size_warns(tmp_path):
    make_trainer(tmp_path, max_steps=4, callbacks=[StopAt(2)]).train()
    store = CheckpointStore(tmp_path)
    checkpoint, _ = store.latest()
    files = checkpoint.files()
    shutil.rmtree(checkpoint.path)
    store.save(2, files, checkpoint.state | {"mixed_precision": "bf16", "num_processes": 2})
    with (
        pytest.warns(UserWarning, match="num_processes=2"),
        pytest.warns(UserWarning, match="mixed_precision='bf16'") as warned,
    ):
        make_trainer(tmp_path, max_steps=4).train(resume=True)
    assert {warning.filename for warning in warned} == {__file__}


def test_corrupt_checkpoints_are_an_error_and_not_a_new_run(tmp_path):
    make_trainer(tmp_path, max_steps=2, save_every=1).train()
    for step in (1, 2):
        file = checkpoint_path(tmp_path, step) / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(
        CorruptCheckpoint, match=r"00002/model\.safetensors.*\w\. .*00001/model\.safetensors.*\. To start"
    ):
        make_trainer(tmp_path, max_steps=2, save_every=1).train(resume=True)


def test_another_model_is_not_also_reported_as_another_optimizer(tmp_path):
    make_trainer(tmp_path, max_steps=2).train()
    trainer = make_trainer(tmp_path, max_steps=2, model=replace(CONFIG, n_layer=3))
    with pytest.raises(ResumeMismatch, match=r"another run:\n  model: n_layer was \d, is 3\.\nUse the settings"):
        trainer.train(resume=True)


@pytest.mark.parametrize(
    ("file", "corrupt", "message"),
    [
        ("model", lambda tensors: tensors.pop("transformer.ln_f.bias"), r"transformer\.ln_f\.bias"),
        (
            "optimizer",
            lambda tensors: tensors.pop("transformer.ln_f.bias//exp_avg"),
            r"ln_f\.bias.*exp_avg",
        ),
        ("rng-0", lambda tensors: tensors.update(torch=torch.zeros(5, dtype=torch.uint8)), "random"),
        ("guard", lambda tensors: tensors.pop("history"), "history"),
    ],
)
def test_invalid_tensors_leave_the_trainer_unchanged(tmp_path, file, corrupt, message):
    make_trainer(tmp_path, max_steps=2).train()
    path = checkpoint_path(tmp_path, 2)
    tensors = load_file(path / f"{file}.safetensors")
    corrupt(tensors)
    save_file(tensors, path / f"{file}.safetensors")
    manifest = json.loads((path / "manifest.json").read_text())
    data = (path / f"{file}.safetensors").read_bytes()
    manifest["files"][f"{file}.safetensors"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))
    trainer = make_trainer(tmp_path, max_steps=2)
    before = weights(trainer)
    with pytest.raises(CorruptCheckpoint, match=message):
        trainer.train(resume=path)
    assert equal(before, weights(trainer))
