"""Evaluation: its result, its errors, and the checkpoints beside it."""

import math
import os
import random
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_runs import (
    CONFIG,
    Recorder,
    UnevenTargets,
    checkpoint_path,
    equal,
    make_trainer,
    saved_steps,
    token_dataset,
    weights,
)
from torch.utils.data import Subset

from homebrew.callbacks.base import Callback
from homebrew.checkpoint.manifest import open_checkpoint
from homebrew.errors import ConfigError, DataError


def test_evaluation_loss_is_the_mean_over_all_targets(tmp_path):
    dataset = UnevenTargets()  # 64 samples in micro-batches of 5
    trainer = make_trainer(tmp_path, eval_dataset=dataset, micro_batch_size=5, global_batch_tokens=5 * 16)
    with torch.no_grad():
        device = trainer.model.device
        logits = trainer.model(dataset.input_ids.to(device))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), dataset.targets.flatten().to(device))
    metrics = trainer.evaluate()
    assert metrics.loss == pytest.approx(loss.item(), abs=1e-5 if device.type == "cpu" else 2e-3)
    assert metrics.num_tokens == int((dataset.targets != -100).sum())
    assert metrics.perplexity == pytest.approx(math.exp(metrics.loss))
    assert trainer.model.training


def test_evaluates_every_eval_every_steps_and_at_the_end(tmp_path):
    recorder = Recorder()
    make_trainer(tmp_path, eval_dataset=token_dataset(200), eval_every=4, callbacks=[recorder]).train()
    assert list(recorder.evaluations) == [4, 6]


def test_eval_batches_limits_the_evaluated_micro_batches(tmp_path):
    trainer = make_trainer(tmp_path, eval_dataset=token_dataset(), eval_batches=3)
    assert trainer.evaluate().num_tokens == 3 * 8 * 16


def test_evaluate_without_a_dataset_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="eval_dataset"):
        make_trainer(tmp_path).evaluate()


class RandomInputs(UnevenTargets):
    """Draws from the global generators of Python, NumPy and PyTorch for every sample."""

    def __getitem__(self, i):
        noise = random.randrange(9) + np.random.randint(9) + torch.randint(9, (16,))  # noqa: NPY002
        return (self.input_ids[i] + noise) % 50, self.targets[i]


class EvaluatesEveryStep(Callback):
    def __init__(self, dataset):
        self.dataset = dataset

    def on_step_end(self, trainer):
        trainer.evaluate(self.dataset)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("dataset", [RandomInputs(), Subset(RandomInputs(), range(5))], ids=["dataset", "subset"])
def test_evaluating_a_dataset_that_draws_random_numbers_does_not_change_the_run(tmp_path, dataset):
    options = {"model": replace(CONFIG, dropout=0.5), "max_steps": 3}
    alone = make_trainer(tmp_path / "alone", **options)
    alone.train()
    evaluated = make_trainer(tmp_path / "evaluated", **options, callbacks=[EvaluatesEveryStep(dataset)])
    evaluated.train()
    assert equal(weights(evaluated), weights(alone))


def test_evaluation_without_scored_targets_is_an_error(tmp_path):
    ignored = [(torch.zeros(16, dtype=torch.int64), torch.full((16,), -100))] * 3
    with pytest.raises(DataError):
        make_trainer(tmp_path).evaluate(ignored)


def dataset_with_a_long_sample():
    """A dataset with a sample that exceeds the block size, and is not one of those read before the first step."""
    samples = [(torch.zeros(16, dtype=torch.int64),) * 2] * 100
    samples[50] = (torch.zeros(17, dtype=torch.int64),) * 2
    return samples


def test_a_failed_evaluation_does_not_save_before_a_checkpoint_is_due(tmp_path):
    trainer = make_trainer(tmp_path, eval_dataset=dataset_with_a_long_sample(), eval_every=2, save_every=3)
    with pytest.raises(DataError):
        trainer.train()
    assert saved_steps(tmp_path) == []


class RaiseOnEvaluate(Callback):
    def on_evaluate(self, trainer, metrics):
        raise KeyError


@pytest.mark.parametrize("fails", ["dataset", "callback"])
def test_a_failed_final_evaluation_still_saves_the_run(tmp_path, fails):
    dataset = dataset_with_a_long_sample() if fails == "dataset" else token_dataset(200)
    trainer = make_trainer(tmp_path, eval_dataset=dataset, max_steps=2, callbacks=[RaiseOnEvaluate()])
    with pytest.raises(DataError if fails == "dataset" else KeyError):
        trainer.train()
    assert saved_steps(tmp_path) == [2]


def test_a_checkpoint_is_scored_only_by_an_evaluation_of_its_own_step(tmp_path):
    trainer = make_trainer(tmp_path, eval_dataset=token_dataset(300), eval_every=3, save_every=2, keep_every=2)
    trainer.train()
    scores = {step: open_checkpoint(checkpoint_path(tmp_path, step)).manifest.score for step in (2, 4, 6)}
    assert [step for step, score in scores.items() if score is not None] == [6]


class SignalInEvaluation(UnevenTargets, Callback):
    """Sends a signal when the evaluation of a step reads its 21st sample of 64."""

    def __init__(self, step, signal_number):
        super().__init__()
        self.step, self.signal_number, self.num_read, self.is_armed = step, signal_number, 0, False

    def on_step_end(self, trainer):
        self.is_armed, self.num_read = trainer.step == self.step, 0

    def __getitem__(self, i):
        self.num_read += 1
        if self.is_armed and self.num_read == 21:
            os.kill(os.getpid(), self.signal_number)
        return super().__getitem__(i)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("step", [4, 6])
def test_a_stop_signal_breaks_off_an_evaluation_which_the_resumed_run_makes(tmp_path, step):
    whole, stopped, resumed = Recorder(), Recorder(), Recorder()
    options = {"eval_every": 2, "save_every": 4}
    expected = make_trainer(tmp_path / "whole", eval_dataset=UnevenTargets(), callbacks=[whole], **options)
    expected.train()
    dataset = SignalInEvaluation(step, signal.SIGTERM)
    with pytest.raises(SystemExit):
        make_trainer(tmp_path / "run", eval_dataset=dataset, callbacks=[stopped, dataset], **options).train()
    assert dataset.num_read < 40
    assert saved_steps(tmp_path / "run")[-1] == step
    assert step not in stopped.evaluations
    trainer = make_trainer(tmp_path / "run", eval_dataset=UnevenTargets(), callbacks=[resumed], **options)
    trainer.train(resume=True)
    losses, expected_losses = (
        [(step, metrics.loss) for step, metrics in evaluations.items()]
        for evaluations in (stopped.evaluations | resumed.evaluations, whole.evaluations)
    )
    assert losses == expected_losses
    assert equal(weights(trainer), weights(expected))
    trainer.train(resume=True)  # all evaluations are made
    assert list(resumed.evaluations) == list(range(step, 7, 2))


def test_a_signal_that_only_saves_does_not_break_off_an_evaluation(tmp_path):
    recorder, dataset = Recorder(), SignalInEvaluation(4, signal.SIGUSR1)
    make_trainer(tmp_path, eval_dataset=dataset, eval_every=2, callbacks=[recorder, dataset]).train()
    assert list(recorder.evaluations) == [2, 4, 6]
    assert saved_steps(tmp_path) == [4, 6]


class EvaluateToo(Callback):
    """Evaluates a second dataset after each evaluation."""

    def __init__(self, dataset):
        self.dataset = dataset
        self.steps = []

    def on_evaluate(self, trainer, metrics):
        trainer.evaluate(self.dataset)
        self.steps.append(trainer.step)


def test_a_stop_signal_does_not_break_off_the_evaluation_of_a_callback(tmp_path):
    recorder, dataset = Recorder(), SignalInEvaluation(4, signal.SIGTERM)
    callback = EvaluateToo(dataset)
    callbacks = [dataset, callback, recorder]
    with pytest.raises(SystemExit):
        make_trainer(tmp_path, eval_dataset=UnevenTargets(), eval_every=2, callbacks=callbacks).train()
    assert callback.steps == list(recorder.evaluations) == [2, 4]
