"""What a Trainer's steps compute: losses, gradients, learning rates, and what they depend on."""

import math

import pytest
import torch
from accelerate import Accelerator
from tiny_runs import CONFIG, Recorder, UnevenTargets, equal, make_trainer, token_dataset, weights

from homebrew import GPT, GPTConfig, TokenDataset
from homebrew.callbacks.base import Callback
from homebrew.training.schedule import warmup_cosine


def test_first_loss_is_ln_of_the_vocabulary_size_and_the_loss_falls(tmp_path):
    recorder = Recorder()
    dataset = TokenDataset.from_tokens(torch.arange(50).repeat(30), 16, vocab_size=50)
    make_trainer(tmp_path, train_dataset=dataset, max_steps=40, callbacks=[recorder]).train()
    assert recorder.losses[1] == pytest.approx(math.log(50), abs=0.1)
    assert recorder.losses[40] < 0.5 * recorder.losses[1]


@pytest.mark.parametrize("dataset", [token_dataset(), UnevenTargets()], ids=["even targets", "uneven targets"])
def test_micro_batch_size_does_not_change_the_step(tmp_path, dataset):
    losses, final_weights = [], []
    for size in (8, 2, 1):
        recorder = Recorder()
        trainer = make_trainer(
            tmp_path / str(size), train_dataset=dataset, micro_batch_size=size, max_steps=4, callbacks=[recorder]
        )
        trainer.train()
        assert trainer.batch.accumulation_steps == 8 // size
        losses.append(recorder.losses)
        final_weights.append(weights(trainer))
    for i in (1, 2):
        assert losses[i] == pytest.approx(losses[0], abs=1e-5)
        for name, value in final_weights[0].items():
            torch.testing.assert_close(final_weights[i][name], value, rtol=0, atol=1e-4)


def test_learning_rate_is_the_schedule_times_the_peak_of_each_group(tmp_path):
    class RecordLearningRates(Callback):
        def on_step_end(self, trainer):
            used.append([group["lr"] for group in optimizer.param_groups])

    used, recorder = [], Recorder()
    model = GPT(CONFIG)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "lr": 0.5},
        {"params": [p for p in model.parameters() if p.dim() < 2], "lr": 0.1},
    ]
    optimizer = torch.optim.SGD(groups)
    callbacks = [RecordLearningRates(), recorder]
    make_trainer(tmp_path, model=model, optimizer=optimizer, warmup_steps=2, callbacks=callbacks).train()
    schedule = warmup_cosine(warmup_steps=2, max_steps=6)
    expected = [[0.5 * schedule(step), 0.1 * schedule(step)] for step in range(6)]
    assert used == [pytest.approx(learning_rates) for learning_rates in expected]
    assert [metrics.learning_rate for metrics in recorder.metrics.values()] == pytest.approx([e[0] for e in expected])


def test_custom_schedule_sets_the_learning_rate(tmp_path):
    recorder = Recorder()
    make_trainer(tmp_path, schedule=lambda step: 1.0 / (step + 1), max_steps=3, callbacks=[recorder]).train()
    learning_rates = [metrics.learning_rate for metrics in recorder.metrics.values()]
    assert learning_rates == pytest.approx([1e-2, 1e-2 / 2, 1e-2 / 3])


def test_a_schedule_is_only_asked_for_the_steps_of_the_run(tmp_path):
    make_trainer(tmp_path, schedule=[0.5, 0.25, 0.25].__getitem__, max_steps=3).train()
    finished = make_trainer(tmp_path, schedule=[0.5, 0.25, 0.25].__getitem__, max_steps=3)
    finished.train(resume=True)
    assert finished.step == 3


@pytest.mark.usefixtures("deterministic")
def test_seed_determines_initial_weights_data_order_and_dropout(tmp_path):
    config = GPTConfig(block_size=16, vocab_size=50, n_layer=1, n_head=2, n_embd=16, dropout=0.2)
    runs = []
    for global_seed, seed in ((10, 1), (11, 1), (10, 2)):
        torch.manual_seed(global_seed)
        trainer = make_trainer(tmp_path / f"{global_seed}-{seed}", model=config, seed=seed)
        trainer.train()
        runs.append(weights(trainer))
    assert equal(runs[0], runs[1])
    assert not equal(runs[0], runs[2])


@pytest.mark.usefixtures("deterministic")
def test_seed_determines_the_dropout_of_a_given_model(tmp_path):
    dataset = [(torch.arange(16), torch.arange(16) + 1)] * 8  # any order is the same
    runs = []
    for seed in (1, 2):
        model = GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=1, n_head=2, n_embd=16, dropout=0.2))
        trainer = make_trainer(tmp_path / str(seed), model=model, train_dataset=dataset, seed=seed, max_steps=2)
        trainer.train()
        runs.append(weights(trainer))
    assert not equal(*runs)


@pytest.mark.usefixtures("deterministic")
def test_activation_checkpointing_runs_each_block_twice_and_changes_nothing_else(tmp_path):
    config = GPTConfig(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=16, dropout=0.2)
    runs, num_calls = [], []
    for enabled in (False, True):
        options = {"activation_checkpointing": enabled, "max_steps": 3, "compile": False}  # the hook counts in Python
        trainer = make_trainer(tmp_path / str(enabled), model=config, **options)
        num_calls.append(0)

        def count(*_):
            num_calls[-1] += 1

        trainer.model.transformer.h[1].attn.register_forward_hook(count)
        trainer.train()
        runs.append(weights(trainer))
    assert equal(*runs)
    assert num_calls == [3, 6]


@pytest.mark.usefixtures("deterministic")
def test_evaluation_does_not_change_training(tmp_path):
    config = GPTConfig(block_size=16, vocab_size=50, n_layer=1, n_head=2, n_embd=16, dropout=0.2)
    runs = []
    for eval_every in (1, None):
        dataset = token_dataset(300, seed=1)
        trainer = make_trainer(tmp_path / str(eval_every), model=config, eval_dataset=dataset, eval_every=eval_every)
        trainer.train()
        runs.append(weights(trainer))
    assert equal(*runs)


def test_frozen_weights_do_not_change(tmp_path):
    model = GPT(CONFIG)
    model.transformer.wpe.requires_grad_(False)
    before = model.transformer.wpe.weight.detach().clone()
    trainer = make_trainer(tmp_path, model=model, max_steps=2)
    trainer.train()
    assert torch.equal(trainer.model.transformer.wpe.weight.cpu(), before)


def test_custom_accelerator_is_used_with_the_configured_accumulation(tmp_path):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=7)
    trainer = make_trainer(tmp_path, accelerator=accelerator, micro_batch_size=4, mixed_precision="auto", max_steps=2)
    before = weights(trainer)
    trainer.train()
    assert trainer.accelerator is accelerator
    assert accelerator.gradient_accumulation_steps == 2
    assert not equal(before, weights(trainer))


def test_accumulation_setting_in_the_environment_is_ignored(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "5")
    trainer = make_trainer(tmp_path, micro_batch_size=4, max_steps=1)
    trainer.train()
    assert trainer.accelerator.gradient_accumulation_steps == 2


def test_creating_another_accelerator_during_training_changes_nothing(tmp_path):
    class CreateAccelerator(Callback):
        def on_step_end(self, trainer):
            Accelerator()

    losses = []
    for callbacks in ([], [CreateAccelerator()]):
        recorder = Recorder()
        make_trainer(tmp_path / str(len(callbacks)), micro_batch_size=2, callbacks=[*callbacks, recorder]).train()
        losses.append(recorder.losses)
    assert losses[0] == losses[1]
