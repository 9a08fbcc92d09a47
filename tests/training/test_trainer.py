import errno
import hashlib
import io
import json
import math
import os
import shutil
import signal
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset

from homebrew import GPT, GPTConfig, TokenDataset, Trainer, TrainerConfig
from homebrew.callbacks.base import Callback
from homebrew.checkpoint.manifest import open_checkpoint
from homebrew.checkpoint.store import CheckpointStore
from homebrew.distributed.signals import HANDLED_SIGNALS
from homebrew.errors import (
    CheckpointError,
    ConfigError,
    CorruptCheckpoint,
    DataError,
    LaunchError,
    NonFiniteError,
    ResumeMismatch,
)
from homebrew.model.lora import LoRAConfig, adapter_state_dict, add_lora, base_fingerprint

SHAPE = GPTConfig(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=16)


def tokens(count=1200, seed=0):
    return torch.randint(0, 50, (count,), generator=torch.Generator().manual_seed(seed))


def dataset(count=1200, seed=0):
    return TokenDataset.from_tokens(tokens(count, seed), block_size=16, vocab_size=50)


def events(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Losses(Callback):
    """Keeps every step's loss."""

    def __init__(self):
        self.losses, self.evaluations = {}, {}

    def on_log(self, trainer, metrics):
        self.losses[metrics.step] = metrics.loss

    def on_evaluate(self, trainer, metrics):
        self.evaluations[metrics.step] = metrics


class StopAt(Callback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, trainer):
        trainer.should_stop = trainer.step == self.step


def make(folder, *, model=SHAPE, train=None, evaluate=None, callbacks=(), optimizer=None, schedule=None, **settings):
    settings = {
        "max_steps": 6,
        "global_batch_tokens": 8 * 16,
        "micro_batch_size": 8,
        "learning_rate": 1e-2,
        "log_every": 1,
        "mixed_precision": "no",  # the same figures on every machine
    } | settings
    return Trainer(
        model,
        dataset() if train is None else train,
        evaluate,
        config=TrainerConfig(output_dir=folder, **settings),
        callbacks=callbacks,
        optimizer=optimizer,
        schedule=schedule,
    )


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def optimizer_state(trainer):
    named = dict(trainer.model.named_parameters())
    return {
        f"{name}/{key}": value.clone()
        for name, parameter in named.items()
        for key, value in trainer._optimizer.state[parameter].items()
    }


def test_first_loss_is_the_logarithm_of_the_vocabulary_and_falls(tmp_path):
    losses = Losses()
    text = torch.arange(50).repeat(30)
    make(tmp_path, train=TokenDataset.from_tokens(text, 16, vocab_size=50), max_steps=60, callbacks=[losses]).train()
    assert losses.losses[1] == pytest.approx(math.log(50), abs=0.1)
    assert losses.losses[60] < 0.5 * losses.losses[1]


def test_micro_batches_make_the_same_step_as_one_batch(tmp_path):
    runs = []
    for size in (8, 2, 1):
        losses = Losses()
        trainer = make(tmp_path / str(size), micro_batch_size=size, callbacks=[losses])
        trainer.train()
        assert trainer.batch.accumulation_steps == 8 // size
        runs.append((losses.losses, weights(trainer)))
    for losses, found in runs[1:]:
        assert losses == pytest.approx(runs[0][0], abs=1e-5)
        assert all(torch.allclose(found[name], runs[0][1][name], atol=1e-4) for name in found)


class Ragged(Dataset):
    """Samples with very different numbers of scored targets, some with none."""

    def __init__(self):
        rows = tokens(64 * 17, seed=3).view(64, 17)
        self.input_ids, self.targets = rows[:, :-1].clone(), rows[:, 1:].clone()
        for i, row in enumerate(self.targets):
            row[: (i * 7) % 17] = -100

    def __len__(self):
        return len(self.input_ids)

    def __getitem__(self, i):
        return self.input_ids[i], self.targets[i]


def test_uneven_targets_weigh_by_token(tmp_path):
    runs = []
    for size in (8, 1):
        losses = Losses()
        make(tmp_path / str(size), train=Ragged(), micro_batch_size=size, callbacks=[losses]).train()
        runs.append(losses.losses)
    assert runs[0] == pytest.approx(runs[1], abs=1e-5)


@pytest.fixture
def deterministic(monkeypatch):
    """A GPU's fastest kernels add up in an order that changes from run to run; a CPU's do not."""
    if not torch.cuda.is_available():
        yield
        return
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("stop", range(1, 9))
def test_stop_and_resume_is_bitwise_the_unbroken_run(tmp_path, stop):
    shape = GPTConfig(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=16, dropout=0.1)
    data = dataset(40 * 16 + 1)  # 40 samples: epochs end in the middle of a step
    whole = make(tmp_path / "whole", model=shape, train=data, evaluate=dataset(200), max_steps=9, eval_every=2)
    whole.train()
    first = make(tmp_path / "parts", model=shape, train=data, max_steps=9, callbacks=[StopAt(stop)])
    first.train()
    assert first.step == stop
    first.save()
    first._saver.wait()
    torch.manual_seed(999)
    second = make(tmp_path / "parts", model=shape, train=data, max_steps=9)
    second.train(resume=True)
    assert second.step == 9
    assert same(weights(whole), weights(second))
    assert same(optimizer_state(whole), optimizer_state(second))


def test_a_run_that_a_callback_stops_is_saved(tmp_path):
    make(tmp_path, callbacks=[StopAt(2)]).train()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_in_a_notebook_a_stop_is_a_keyboard_interrupt_after_the_save(tmp_path, monkeypatch, number):
    class Stop(Callback):
        def on_step_end(self, trainer):
            if trainer.step == 3:
                os.kill(os.getpid(), number)

    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    handlers = [signal.getsignal(each) for each in HANDLED_SIGNALS]
    trainer = make(tmp_path, callbacks=[Stop()])
    with pytest.raises(KeyboardInterrupt, match=f"{number.name} after saving"):
        trainer.train()
    assert CheckpointStore(tmp_path).latest()[0].step == 3
    assert [signal.getsignal(each) for each in HANDLED_SIGNALS] == handlers
    trainer.train(resume=True)  # the next cell
    assert trainer.step == 6


def test_a_save_that_fails_while_the_run_ends_otherwise_is_told_of_and_over(tmp_path, monkeypatch):
    class Break(Callback):
        def on_save(self, trainer, path):
            if broken:
                raise ValueError("a callback's own")

    def full(*_):
        raise CheckpointError("no space")

    broken = True
    trainer = make(tmp_path, max_steps=4, save_every=2, callbacks=[Break()])
    with monkeypatch.context() as patch:
        patch.setattr("homebrew.checkpoint.store.write_checkpoint", full)
        with (
            pytest.warns(UserWarning, match="A checkpoint could not be written either: no space"),
            pytest.raises(ValueError, match="a callback's own"),
        ):
            trainer.train()
    broken = False
    assert trainer.save().is_dir()  # this step is not taken to be saved
    trainer.train(resume=True)
    assert trainer.step == 4


def test_processes_that_wait_for_a_writer_ask_again_and_again(tmp_path, monkeypatch):
    asked, enough = [], threading.Event()

    def gather(accelerator, data):
        asked.append(json.loads(data))
        if len(asked) == 3:
            enough.set()
        return [data]

    trainer = make(tmp_path, max_steps=1)
    trainer.train()
    trainer._saver._writer.start(enough.wait, name="slow")  # a disk that is slower than any collective may be
    monkeypatch.setattr("homebrew.checkpoint.manager._ASK_SECONDS", 0.01)
    monkeypatch.setattr("homebrew.checkpoint.manager.gather_bytes", gather)
    trainer._saver.wait()
    assert asked[:3] == [[True, False]] * 3
    assert asked[-1] == [False, False]


def test_a_save_outside_a_run_does_not_wait_for_a_process_that_is_lost(tmp_path, monkeypatch):
    def lost(*_):
        raise torch.distributed.DistNetworkError("Connection closed by peer")

    given_up = []
    trainer = make(tmp_path, max_steps=1)
    trainer.train()
    trainer._saver._reports = SimpleNamespace(give_up=lambda: given_up.append(True))
    monkeypatch.setattr("homebrew.checkpoint.manager.gather_bytes", lost)
    with pytest.raises(torch.distributed.DistNetworkError):
        trainer.save()
    assert given_up == [True]


def test_a_run_that_saved_nothing_begins_anew_and_says_so(tmp_path):
    class Dies(Callback):
        def on_step_end(self, trainer):
            if trainer.step == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, callbacks=[Dies()]).train()
    with pytest.warns(UserWarning, match="figures of a run that saved no checkpoint: it begins anew"):
        make(tmp_path).train(resume=True)


def test_a_checkpoint_is_saved_every_500_steps_if_nothing_else_is_said(tmp_path):
    assert TrainerConfig(output_dir=tmp_path, max_steps=1).save_every == 500


def test_a_guard_that_raised_does_not_hold_back_what_comes_after(tmp_path):
    trainer = make(tmp_path, max_steps=4)
    before = {name: value.clone() for name, value in weights(trainer).items()}
    poison = trainer.model.transformer.ln_f.bias.register_hook(lambda grad: grad * float("nan"))
    with pytest.raises(NonFiniteError):
        trainer.train()
    assert same(before, weights(trainer))
    poison.remove()
    with pytest.warns(UserWarning, match="starts at step 0 with the weights"):
        trainer.train(resume=True)
    assert not same(before, weights(trainer))


def test_a_save_that_failed_is_tried_again(tmp_path, monkeypatch):
    trainer = make(tmp_path, max_steps=2)
    with monkeypatch.context() as patch:
        patch.setattr("homebrew.checkpoint.store.fsync_directory", no_space)
        with pytest.raises(CheckpointError, match="No space"):
            trainer.train()
    assert (trainer.save() / "manifest.json").exists()


def no_space(path):
    raise OSError(errno.ENOSPC, "No space left on device")


class Counting(torch.optim.Optimizer):
    """Keeps plain numbers, for each parameter and for all of them, as many optimizers do."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1, "seen": 0, "distance": 1e-6})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["seen"] += 1
            group["distance"] *= 1.7
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state |= {"step": 0, "decay": 0.5, "odd": False, "moment": torch.zeros_like(parameter)}
                state["step"] += 1
                state["decay"] *= 0.9
                state["odd"] = not state["odd"]
                state["moment"].lerp_(parameter.grad, state["decay"])
                scale = group["lr"] * (1 + group["distance"] + state["odd"]) / (state["step"] + group["seen"])
                parameter.sub_(state["moment"], alpha=scale)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize(
    "optimizer",
    [
        Counting,
        lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        lambda parameters: torch.optim.Adafactor(parameters, lr=0.1),
    ],
)
def test_your_own_optimizer_resumes_bitwise(tmp_path, optimizer):
    runs = []
    for name, stops in (("whole", [None]), ("parts", [3, None])):
        for stop in stops:
            model = GPT(SHAPE)
            callbacks = [] if stop is None else [StopAt(stop)]
            trainer = make(tmp_path / name, model=model, optimizer=optimizer(model.parameters()), callbacks=callbacks)
            trainer.train(resume=True)
        runs.append(weights(trainer))
    assert same(*runs)


def test_what_an_optimizer_keeps_and_no_checkpoint_can_is_told_once(tmp_path):
    class Hoarding(torch.optim.SGD):
        def step(self, closure=None):
            super().step()
            for group in self.param_groups:
                group["log"] = [*group.get("log", []), torch.tensor(0)]
                for parameter in group["params"]:
                    self.state[parameter]["words"] = "many"

    model = GPT(SHAPE)
    trainer = make(tmp_path, model=model, optimizer=Hoarding(model.parameters(), lr=0.1), save_every=2)
    with pytest.warns(UserWarning, match="Hoarding keeps words, log, which") as told:
        trainer.train()
    assert len(told) == 1


def test_frozen_weights_are_saved_too(tmp_path):
    model, other = (GPT(SHAPE, seed=seed) for seed in (1, 2))
    for gpt in (model, other):
        gpt.transformer.wpe.requires_grad_(False)
        make(tmp_path, model=gpt, max_steps=2).train(resume=True)
    assert same(model.state_dict(), other.state_dict())


def test_evaluation_is_exact_for_any_remainder(tmp_path):
    data = Ragged()
    trainer = make(tmp_path, evaluate=data, micro_batch_size=5, global_batch_tokens=5 * 16)
    with torch.no_grad():
        device = trainer.model.device
        logits = trainer.model(data.input_ids.to(device))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), data.targets.flatten().to(device))
    found = trainer.evaluate()
    assert found.loss == pytest.approx(loss.item(), abs=1e-5 if device.type == "cpu" else 2e-3)
    assert found.num_tokens == int((data.targets != -100).sum())
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert trainer.model.training


def test_an_evaluation_that_scores_nothing_is_an_error(tmp_path):
    unscored = [(torch.zeros(16, dtype=torch.int64), torch.full((16,), -100))] * 3
    with pytest.raises(DataError, match="No target is scored"):
        make(tmp_path).evaluate(unscored)


def test_a_model_with_nothing_to_train_is_refused(tmp_path):
    model = GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=1, n_head=1, n_embd=8)).requires_grad_(False)
    with pytest.raises(ConfigError, match="No parameter of the model trains"):
        make(tmp_path, model=model)


def test_a_last_evaluation_that_fails_does_not_lose_the_run(tmp_path):
    short = [(torch.zeros(16, dtype=torch.int64),) * 2] * 4 + [(torch.zeros(5, dtype=torch.int64),) * 2]
    trainer = make(tmp_path / "data", evaluate=short, eval_every=2, save_every=3, max_steps=6)
    with pytest.raises(DataError):
        trainer.train()  # its first evaluation, when no checkpoint is due
    assert CheckpointStore(tmp_path / "data").steps() == []
    with pytest.raises(DataError):
        make(tmp_path / "last", evaluate=short, max_steps=4).train()
    assert CheckpointStore(tmp_path / "last").latest()[0].step == 4

    class Stumbles(Callback):
        def on_evaluate(self, trainer, metrics):
            raise KeyError

    trainer = make(tmp_path / "callback", evaluate=dataset(200), max_steps=4, callbacks=[Stumbles()])
    with pytest.raises(KeyError):
        trainer.train()
    assert CheckpointStore(tmp_path / "callback").latest()[0].step == 4


def test_an_optimizer_must_be_the_models(tmp_path):
    shape = GPTConfig(block_size=16, vocab_size=50, n_layer=1, n_head=1, n_embd=8)
    for parameters, told in (
        (GPT(shape).parameters(), "not the model's"),
        ([GPT(shape).lm_head.weight], "not the model's"),
    ):
        with pytest.raises(ConfigError, match=told):
            make(tmp_path, model=GPT(shape), optimizer=torch.optim.SGD(parameters, lr=0.1))
    model = GPT(shape)
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    with pytest.raises(ConfigError, match=r"lacks 6 .*wte.weight among them"):
        make(tmp_path, model=model, optimizer=torch.optim.SGD(vectors, lr=0.1))
    for parameter in model.parameters():
        parameter.requires_grad = parameter.dim() < 2
    make(tmp_path, model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1)).train()


@pytest.mark.parametrize("rate", [1e-3, torch.tensor(1e-3)])
def test_an_optimizer_is_given_back_with_its_own_rate(tmp_path, rate):
    model = GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=1, n_head=1, n_embd=8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, amsgrad=True, foreach=False)
    make(tmp_path / "a", model=model, optimizer=optimizer).train()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)
    trainer = make(tmp_path / "a", model=model, optimizer=optimizer, max_steps=8)
    trainer.train(resume=True, accept_changes=["schedule"])
    assert trainer.step == 8


def test_what_compiling_evaluations_and_saves_take_is_no_training_time(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # a GPU has a clock of its own
    now = [0.0]
    monkeypatch.setattr("homebrew.metrics.throughput.time", SimpleNamespace(perf_counter=lambda: now[0]))

    def takes(seconds):
        now[0] += seconds

    class Slow(Callback):
        def on_evaluate(self, trainer, metrics):
            takes(50)
            trainer.save()

        def on_save(self, trainer, path):
            takes(50)

        def on_step_end(self, trainer):
            if trainer.step == 2:
                trainer.evaluate()

        def on_log(self, trainer, metrics):
            rates.append(metrics.tokens_per_second)
            trainer.evaluate()

    monkeypatch.setattr("homebrew.training.trainer.compile_model", lambda *_, **__: "yes")
    monkeypatch.setattr("homebrew.training.trainer.warm_up_compiled", lambda *_, **__: takes(50))
    rates = []
    trainer = make(tmp_path, evaluate=dataset(200), eval_every=3, max_steps=5, callbacks=[Slow()])
    trainer.model.register_forward_hook(lambda *_: takes(0.5))  # evaluation's passes among them
    trainer.train()
    assert rates == [8 * 16 / 0.5] * 5


@pytest.mark.parametrize("save_every", [None, 1, 2])
@pytest.mark.parametrize("log_every", [1, 2])
def test_a_callback_that_is_told_of_a_step_may_save(tmp_path, log_every, save_every):
    class Saves(Callback):
        def __init__(self):
            self.saves = []

        def on_log(self, trainer, metrics):
            trainer.save()

        def on_save(self, trainer, path):
            self.saves.append(trainer.step)

    reported, saves = Reported(), Saves()
    make(tmp_path, log_every=log_every, save_every=save_every, max_steps=5, callbacks=[reported, saves]).train()
    assert [step for step, _ in reported.steps] == ([1, 2, 3, 4, 5] if log_every == 1 else [1, 2, 4, 5])
    assert saves.saves == sorted(set(saves.saves))
    assert [event["step"] for event in events(tmp_path) if event["event"] == "save"] == saves.saves


def test_times_are_those_of_the_steps(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    now, elapsed = [0.0], []

    class Elapsed(Callback):
        def on_log(self, trainer, metrics):
            elapsed.append(metrics.elapsed_seconds)

    def hook(*_):
        now[0] += 1.0

    monkeypatch.setattr("homebrew.metrics.throughput.time", SimpleNamespace(perf_counter=lambda: now[0]))
    trainer = make(tmp_path, callbacks=[Elapsed()])
    trainer.model.register_forward_hook(hook)
    trainer.train()
    assert elapsed == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


class Reported(Callback):
    """The steps that are reported, and those that had been taken then."""

    def __init__(self):
        self.steps = []

    def on_log(self, trainer, metrics):
        self.steps.append((metrics.step, trainer.step))


def test_a_step_is_reported_when_the_next_is_on_its_way(tmp_path):
    reported = Reported()
    make(tmp_path, evaluate=dataset(), log_every=2, eval_every=4, max_steps=9, callbacks=[reported]).train()
    assert reported.steps == [(1, 2), (2, 3), (4, 4), (6, 7), (8, 8), (9, 9)]


def test_a_run_that_is_stopped_reports_what_it_owes(tmp_path):
    reported = Reported()
    trainer = make(tmp_path, log_every=2, callbacks=[StopAt(2), reported])
    trainer.train()
    assert reported.steps == [(1, 2), (2, 2)]
    trainer.callbacks[2].step = 5
    trainer.train(resume=True)
    assert reported.steps == [(1, 2), (2, 2), (4, 5)]


def test_a_report_that_a_broken_run_owed_is_not_made_up_for(tmp_path):
    class Breaks(Callback):
        def on_step_end(self, trainer):
            if trainer.step == 2:
                raise KeyboardInterrupt

    reported = Reported()
    trainer = make(tmp_path, log_every=2, save_every=1, callbacks=[Breaks(), reported])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert reported.steps == [(1, 1)]
    trainer.save()
    assert reported.steps == [(1, 1)]
    del trainer.callbacks[2]
    trainer.train(resume=True)
    assert reported.steps == [(1, 1), (4, 4), (6, 6)]


def test_an_accelerator_that_is_built_meanwhile_changes_nothing(tmp_path):
    class Builds(Callback):
        def on_step_end(self, trainer):
            Accelerator()

    runs = []
    for name, more in (("plain", []), ("builds", [Builds()])):
        losses = Losses()
        make(tmp_path / name, micro_batch_size=2, callbacks=[losses, *more]).train()
        runs.append(losses.losses)
    assert runs[0] == runs[1]


def test_a_runs_folder_is_no_checkpoint(tmp_path):
    make(tmp_path).train()
    with pytest.raises(ConfigError, match="is a run's folder: give resume=True"):
        make(tmp_path).train(resume=tmp_path)


@pytest.mark.usefixtures("deterministic")
def test_evaluating_changes_nothing_in_training(tmp_path):
    runs = []
    for name, every in (("often", 1), ("never", None)):
        trainer = make(tmp_path / name, evaluate=dataset(300, seed=1), eval_every=every)
        trainer.train()
        runs.append(weights(trainer))
    assert same(*runs)


@pytest.mark.usefixtures("deterministic")
def test_one_seed_sets_model_order_and_dropout(tmp_path):
    shape = GPTConfig(block_size=16, vocab_size=50, n_layer=1, n_head=2, n_embd=16, dropout=0.2)
    runs = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.manual_seed(hash(name) % 1000)
        trainer = make(tmp_path / name, model=shape, seed=seed)
        trainer.train()
        runs.append(weights(trainer))
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


@pytest.mark.filterwarnings("ignore:A checkpoint could not be written either")  # unless it is the first to be told
@pytest.mark.parametrize("where", ["weights", "gradient"])
def test_a_number_that_is_not_finite_stops_the_run_before_the_weights(tmp_path, where):
    trainer = make(tmp_path, max_steps=6, log_every=3, save_every=1, callbacks=[])
    bias = trainer.model.transformer.ln_f.bias
    if where == "gradient":
        handle = bias.register_hook(lambda grad: grad * float("nan") if trainer.step == 2 else grad)
    else:

        class Poison(Callback):
            def on_step_end(self, trainer):
                if trainer.step == 2:
                    bias.data[0] = float("inf")

        trainer.callbacks.append(Poison())
    with pytest.raises(NonFiniteError, match="step 2 "):
        trainer.train()
    saved = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert saved == ["step-00000001", "step-00000002"][: 1 if where == "weights" else 2]
    if where == "gradient":
        assert all(value.isfinite().all() for value in weights(trainer).values())
        handle.remove()


def test_skip_leaves_the_bad_step_out_and_says_so(tmp_path):
    trainer = make(tmp_path, non_finite="skip", max_steps=4)
    trainer.model.transformer.ln_f.bias.register_hook(lambda grad: grad * float("nan") if trainer.step == 2 else grad)
    trainer.train()
    assert all(value.isfinite().all() for value in weights(trainer).values())
    held_back = [event for event in events(tmp_path) if event["event"] == "held_back"]
    assert [(event["step"], event["reason"]) for event in held_back] == [(2, "non_finite")]


def test_under_a_loss_scaler_no_step_is_called_a_spike(tmp_path):
    accelerator = Accelerator()
    accelerator.scaler = torch.amp.GradScaler("cpu")  # which has the last word on what is left out
    settings = {"max_steps": 70, "micro_batch_size": 8, "learning_rate": 1e-9, "loss_spike_zscore": 1e-3}
    config = TrainerConfig(output_dir=tmp_path, **settings)
    Trainer(SHAPE, dataset(), config=config, accelerator=accelerator).train()
    assert not [event for event in events(tmp_path) if event["event"] == "held_back"]


def test_a_loss_spike_is_left_out_on_request(tmp_path):
    # Not compiled: on a GPU, after other models of this shape in the process, the hook went unheard (PyTorch 2.11).
    trainer = make(tmp_path, loss_spike_zscore=6.0, max_steps=60, learning_rate=1e-4, compile=False)
    trainer.model.transformer.ln_f.register_forward_hook(lambda *args: args[-1] * 50 if trainer.step == 55 else None)
    trainer.train()
    held_back = [event for event in events(tmp_path) if event["event"] == "held_back"]
    assert [(event["step"], event["reason"]) for event in held_back] == [(55, "loss_spike")]


@pytest.mark.usefixtures("deterministic")
def test_lora_trains_and_saves_the_adapter_only_and_resumes_bitwise(tmp_path):
    def adapted():
        model = GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=16, dropout=0.1))
        add_lora(model, LoRAConfig(rank=2, dropout=0.1))
        return model

    whole = make(tmp_path / "whole", model=adapted())
    base = base_fingerprint(whole.model)
    whole.train()
    assert base_fingerprint(whole.model) == base
    make(tmp_path / "parts", model=adapted(), callbacks=[StopAt(3)], save_every=3).train()
    second = make(tmp_path / "parts", model=adapted())
    second.train(resume=True)
    assert same(weights(whole), weights(second))
    assert same(optimizer_state(whole), optimizer_state(second))
    saved = load_file(tmp_path / "parts" / "checkpoints" / "step-00000006" / "adapter.safetensors")
    assert saved.keys() == adapter_state_dict(whole.model).keys()
    assert not (tmp_path / "parts" / "checkpoints" / "step-00000006" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("file", "damage", "told"),
    [
        ("model", lambda t: t.pop("transformer.ln_f.bias"), "has no tensor transformer.ln_f.bias"),
        ("model", lambda t: t.update(extra=torch.zeros(1)), "an unknown tensor extra"),
        ("model", lambda t: t.update({"transformer.ln_f.bias": torch.zeros(3)}), r"shape \(3,\)"),
        ("model", lambda t: t.update({"transformer.ln_f.bias": torch.zeros(16).long()}), "torch.int64"),
        (
            "optimizer",
            lambda t: t.pop("transformer.ln_f.bias//exp_avg"),
            "no tensor transformer.ln_f.bias//exp_avg",
        ),
        ("optimizer", lambda t: t.update({"nobody//exp_avg": torch.zeros(16)}), "unknown tensor.s state: nobody"),
        ("rng-0", lambda t: t.update(torch=torch.zeros(5, dtype=torch.uint8)), "random states"),
        ("guard", lambda t: t.pop("history"), "has no tensor history"),
    ],
)
def test_a_checkpoint_with_other_tensors_is_refused_by_name(tmp_path, file, damage, told):
    make(tmp_path, max_steps=2).train()
    path = tmp_path / "checkpoints" / "step-00000002"
    tensors = load_file(path / f"{file}.safetensors")
    damage(tensors)
    save_file(tensors, path / f"{file}.safetensors")
    manifest = json.loads((path / "manifest.json").read_text())
    data = (path / f"{file}.safetensors").read_bytes()
    manifest["files"][f"{file}.safetensors"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))
    trainer = make(tmp_path, max_steps=2)
    before = {name: value.clone() for name, value in weights(trainer).items()}
    with pytest.raises(CorruptCheckpoint, match=told):
        trainer.train(resume=path)
    assert same(before, weights(trainer))


def test_a_longer_run_is_told_as_that_and_goes_on(tmp_path):
    make(tmp_path, max_steps=2).train()
    with pytest.raises(ResumeMismatch, match="schedule: max_steps was 2, is 4, learning rates first differ where"):
        make(tmp_path, max_steps=4).train(resume=True)
    longer = make(tmp_path, max_steps=4)
    longer.train(resume=True, accept_changes=["schedule"])
    assert longer.step == 4


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(tmp_path):
    make(tmp_path, max_steps=2).train()
    damaged = tmp_path / "checkpoints" / "step-00000002" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(CorruptCheckpoint, match=r"No checkpoint in .* is whole: .*model.safetensors.* move them away"):
        make(tmp_path, max_steps=2).train(resume=True)


class Gone(io.StringIO):
    """A standard output nobody reads any more."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, _text):
        raise self.error


@pytest.mark.parametrize("error", [BrokenPipeError(errno.EPIPE, "Broken pipe"), OSError(errno.EIO, "gone")])
def test_a_run_does_not_end_with_its_terminal(tmp_path, monkeypatch, error):
    monkeypatch.setattr(sys, "stdout", Gone(error))
    trainer = make(tmp_path, max_steps=2)
    trainer.train()
    assert trainer.step == 2


def test_a_run_is_not_taken_up_where_it_has_gone_further(tmp_path):
    make(tmp_path, save_every=2, max_steps=6, keep_every=2).train()
    old = tmp_path / "checkpoints" / "step-00000002"
    for source in (old, shutil.copytree(old, tmp_path / "copy" / old.name)):
        with pytest.raises(ConfigError, match=r"older than .*step-00000006, .* Choose another output_dir"):
            make(tmp_path).train(resume=source)

    elsewhere = make(tmp_path / "elsewhere", max_steps=6, callbacks=[StopAt(2)])
    elsewhere.train(resume=old)
    assert elsewhere.save().is_dir()  # of the step it came with, here as well


def test_a_checkpoint_is_ranked_by_its_own_step_s_evaluation(tmp_path):
    make(tmp_path, evaluate=dataset(300), eval_every=3, save_every=2, keep_every=2, max_steps=6).train()
    scored = {
        step: open_checkpoint(tmp_path / "checkpoints" / f"step-0000000{step}").manifest.score for step in (2, 4, 6)
    }
    assert [step for step, score in scored.items() if score is not None] == [6]


def test_a_schedule_that_gives_other_numbers_than_python_s(tmp_path):
    make(tmp_path, schedule=lambda step: np.float32(0.5), max_steps=1).train()
    with pytest.raises(ConfigError, match=r"schedule\(0\) is None: it must be the number"):
        make(tmp_path, schedule=lambda step: None)


def test_metrics_file_and_run_file(tmp_path):
    trainer = make(tmp_path, evaluate=dataset(300), eval_every=3, save_every=3)
    trainer.train()
    found = events(tmp_path)
    steps = [event["step"] for event in found if event["event"] == "step"]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert [event["step"] for event in found if event["event"] == "evaluate"] == [3, 6]
    assert [event["step"] for event in found if event["event"] == "save"] == [3, 6]
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["model"]["n_layer"] == 2
    assert run["train_dataset"]["fingerprint"] == trainer.train_dataset.fingerprint


def test_tensorboard(tmp_path):
    make(tmp_path, log_with="tensorboard", max_steps=2).train()
    assert list((tmp_path / "logs").rglob("events.out.tfevents.*"))


def test_an_optimizer_and_a_schedule_of_your_own(tmp_path):
    model = GPT(SHAPE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    seen = []

    class Watch(Callback):
        def on_log(self, trainer, metrics):
            seen.append(metrics.learning_rate)

    before = model.lm_head.weight.detach().clone()
    make(
        tmp_path,
        model=model,
        optimizer=optimizer,
        schedule=lambda step: 1.0 / (step + 1),
        callbacks=[Watch()],
        max_steps=3,
    ).train()
    assert seen == pytest.approx([0.5, 0.25, 0.5 / 3])
    assert not torch.equal(before, model.lm_head.weight.cpu())


def test_an_accelerator_of_your_own(tmp_path):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=7)
    trainer = Trainer(
        SHAPE,
        dataset(),
        config=TrainerConfig(output_dir=tmp_path, max_steps=2, global_batch_tokens=128, micro_batch_size=4),
        accelerator=accelerator,
    )
    before = weights(trainer)
    trainer.train()
    assert trainer.accelerator is accelerator
    assert accelerator.gradient_accumulation_steps == 2
    assert not same(before, weights(trainer))


def test_accumulation_from_the_environment_is_overruled(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "5")
    trainer = make(tmp_path, micro_batch_size=4)
    trainer.train()
    assert trainer.accelerator.gradient_accumulation_steps == 2


def test_sample_decodes(tmp_path):
    text = "To be, or not to be: that is the question.\n" * 40
    data = TokenDataset.from_text(text, block_size=16, tokenizer="char")
    trainer = make(
        tmp_path,
        model=GPTConfig(block_size=16, vocab_size=data.vocab_size, n_layer=1, n_head=1, n_embd=16),
        train=data,
    )
    trainer.train()
    said = trainer.sample("To be", max_new_tokens=40, seed=1)
    assert said.startswith("To be")
    assert len(said) == 45
    assert said == trainer.sample("To be", max_new_tokens=40, seed=1)
    assert len(trainer.sample(max_new_tokens=40, seed=1)) == 40


def test_sample_begins_where_there_is_no_line_end(tmp_path):
    data = TokenDataset.from_text("GATTACA" * 40, block_size=16, tokenizer="char")
    shape = GPTConfig(block_size=16, vocab_size=data.vocab_size, n_layer=1, n_head=1, n_embd=16)
    said = make(tmp_path, model=shape, train=data).sample(max_new_tokens=40)
    assert len(said) == 40
    assert set(said) <= set("GATC")


def test_an_output_folder_that_holds_a_run(tmp_path):
    make(tmp_path, max_steps=1).train()
    with pytest.raises(ConfigError, match="already holds a run"):
        make(tmp_path, max_steps=1).train()
    make(tmp_path, max_steps=1).train(resume=True)


def test_an_output_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="output_dir"):
        make(tmp_path / "file").train()


def test_another_datasets_checkpoint_is_named(tmp_path):
    make(tmp_path, max_steps=2).train()
    other = make(tmp_path, train=dataset(seed=9), max_steps=2)
    with pytest.raises(ResumeMismatch, match="dataset"):
        other.train(resume=True)


def test_another_way_to_launch_is_told(tmp_path):
    make(tmp_path, max_steps=4, callbacks=[StopAt(2)]).train()
    store = CheckpointStore(tmp_path)
    found, _ = store.latest()
    store.save(3, found.files(), found.state | {"mixed_precision": "bf16", "num_processes": 2})
    with (
        pytest.warns(UserWarning, match="saved by 2 process"),
        pytest.warns(UserWarning, match="trained with mixed_precision='bf16', this run has 'no'"),
    ):
        make(tmp_path, max_steps=4).train(resume=True)


CHANGES = {
    "dataset": {"train": dataset(seed=9)},
    "model": {"model": GPTConfig(block_size=16, vocab_size=50, n_layer=1, n_head=2, n_embd=16)},
    "schedule": {"schedule": lambda step: 0.5},
    "peak": {"learning_rate": 2e-2},
    "optimizer": {"weight_decay": 0.2},
    "clipping": {"max_grad_norm": 0.5},
    "global_batch_size": {"global_batch_tokens": 16 * 16},
    "seed": {"seed": 1},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_run_is_named_and_goes_on_knowingly(tmp_path, change):
    make(tmp_path, max_steps=4, callbacks=[StopAt(2)]).train()
    trainer = make(tmp_path, max_steps=4, **CHANGES[change])
    aspect = {"peak": "schedule", "clipping": "optimizer"}.get(change, change)
    with pytest.raises(ResumeMismatch, match=rf"(?s)\n  {aspect}: .*accept_changes=\('{aspect}',\)") as told:
        trainer.train(resume=True)
    assert str(told.value).count("\n  ") == 1  # and no other
    if aspect == "model":  # what is not there cannot be gone on with
        with pytest.raises(CorruptCheckpoint, match="unknown tensor"):
            trainer.train(resume=True, accept_changes=[aspect])
    else:
        trainer.train(resume=True, accept_changes=[aspect])
        assert trainer.step == 4


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (TokenDataset.from_tokens(tokens(), 32, vocab_size=50), "block_size is 16"),
        (TokenDataset.from_tokens(tokens() * 2, 16, vocab_size=100), "vocab_size is 50"),
        (torch.utils.data.TensorDataset(torch.zeros(4, 16)), r"\(input_ids, targets\)"),
        ([], "is empty"),
    ],
)
def test_data_the_model_cannot_read(tmp_path, data, told):
    with pytest.raises(DataError, match=told):
        make(tmp_path, train=data)


def test_a_launcher_whose_world_differs(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LaunchError, match="started 2 processes, but Accelerate sees 1"):
        make(tmp_path)


def test_a_launcher_that_starts_one_of_several(tmp_path, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    with pytest.raises(LaunchError, match="asked for several processes"):
        make(tmp_path)


def test_fsdp_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises((LaunchError, ValueError)):
        make(tmp_path)


def test_a_run_that_broke_off_in_its_first_step_can_take_up_another_one(tmp_path, monkeypatch):
    make(tmp_path / "other", max_steps=4).train()
    checkpoint = tmp_path / "other" / "checkpoints" / "step-00000004"
    runs = []
    for name in ("unbroken", "broken"):
        trainer = make(tmp_path / name, max_steps=6)
        if name == "broken":
            monkeypatch.setattr(trainer._guard, "judge", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                trainer.train()
            monkeypatch.undo()
        trainer.train(resume=checkpoint, accept_changes=["schedule"])
        runs.append(weights(trainer))
    assert same(*runs)
