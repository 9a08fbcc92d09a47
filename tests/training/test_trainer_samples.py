"""Datasets in the formats that users have: the losses equal those of batches made by hand."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny_runs import CONFIG, Recorder, StopAt, checkpoint_tensors, equal, make_trainer, random_tokens
from torch.nn import functional as F

from homebrew import GPT, DictDataset
from homebrew.data.sampler import sample_indices

LENGTHS = [1 + (i * 7) % 16 for i in range(40)]
ROWS = [ids.tolist() for ids in random_tokens(sum(LENGTHS), seed=5).split(LENGTHS)]
MASKS = [[int((i + position) % 3 > 0) for position in range(len(row))] for i, row in enumerate(ROWS)]
LABELS = [
    [token if keep else -100 for token, keep in zip(*row_and_mask, strict=True)]
    for row_and_mask in zip(ROWS, MASKS, strict=True)
]


def shifted(labels):
    return [*labels[1:], -100]


def padded(rows, value):
    return [row + [value] * (16 - len(row)) for row in rows]


def attention(rows):
    return padded([[1] * len(row) for row in rows], 0)


PLAIN = [shifted(row) for row in ROWS]
MASKED = [shifted(row) for row in LABELS]
DATASETS = {
    "lists of ids": (ROWS, PLAIN),
    "pairs of uint8": ([(np.array(row, np.uint8), np.array(shifted(row), np.int16)) for row in ROWS], PLAIN),
    "token column": (Dataset.from_dict({"input_ids": ROWS, "text": ["some text"] * 40}), PLAIN),
    "torch format": (Dataset.from_dict({"input_ids": ROWS, "targets": PLAIN}).with_format("torch"), PLAIN),
    "padded": (
        Dataset.from_dict({"input_ids": padded(ROWS, 99), "attention_mask": attention(ROWS)}).with_format("numpy"),
        PLAIN),
    "chat mask": (Dataset.from_dict({"input_ids": ROWS, "loss_mask": MASKS}), MASKED),
    "labels": (DictDataset(Dataset.from_dict({"input_ids": ROWS, "labels": LABELS}), labels_are_shifted=False), MASKED),
    "shifted labels": (
        DictDataset([{"input_ids": row, "labels": labels} for row, labels in zip(ROWS, MASKED, strict=True)],
                    labels_are_shifted=True), MASKED),
    "padded labels": (
        DictDataset(
            Dataset.from_dict({
                "input_ids": padded(ROWS, 49), "labels": padded(LABELS, 49), "attention_mask": attention(ROWS),
            }), labels_are_shifted=False), MASKED),
}  # fmt: skip


def hand_made_losses(targets, num_steps, seed=42):
    """Train on one sample at a time, without padding; return the loss of each step and the loss of all samples."""
    model = GPT(CONFIG, seed=seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)

    def total(index):
        logits = model(torch.tensor([ROWS[index]]))[0]
        return F.cross_entropy(logits, torch.tensor(targets[index]), ignore_index=-100, reduction="sum")

    def count(indices):
        return sum(token != -100 for index in indices for token in targets[index])

    losses = []
    for step in range(num_steps):
        indices = sample_indices(np.arange(8 * step, 8 * step + 8), len(ROWS), seed).tolist()
        loss = sum(map(total, indices)) / count(indices)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    with torch.no_grad():
        return losses, (sum(map(total, range(40))) / count(range(40))).item(), count(range(40))


@pytest.mark.parametrize("micro_batch_size", [1, 8])
@pytest.mark.parametrize("name", DATASETS)
def test_losses_equal_those_of_unpadded_samples(tmp_path, name, micro_batch_size):
    dataset, targets = DATASETS[name]
    recorder, model = Recorder(), GPT(CONFIG, seed=42)
    trainer = make_trainer(
        tmp_path,
        model=model,
        train_dataset=dataset,
        eval_dataset=dataset,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.5),
        schedule=lambda step: 1.0,
        callbacks=[recorder],
        micro_batch_size=micro_batch_size,
        max_grad_norm=None,
        max_steps=10,
    )
    trainer.train()
    losses, eval_loss, num_targets = hand_made_losses(targets, num_steps=10)
    assert list(recorder.losses.values()) == pytest.approx(losses, rel=1e-5)
    assert recorder.evaluations[10].loss == pytest.approx(eval_loss, rel=1e-5)
    assert recorder.evaluations[10].num_tokens == num_targets


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("name", ["labels", "token column"])
def test_a_run_on_ragged_samples_resumes_bitwise(tmp_path, name, num_workers):
    options = {"train_dataset": DATASETS[name][0], "micro_batch_size": 4, "num_workers": num_workers}
    make_trainer(tmp_path / "uninterrupted", **options).train()
    make_trainer(tmp_path / "stopped", callbacks=[StopAt(3)], **options).train()
    make_trainer(tmp_path / "stopped", **options).train(resume=True)
    assert equal(checkpoint_tensors(tmp_path / "stopped", 6), checkpoint_tensors(tmp_path / "uninterrupted", 6))


@pytest.mark.parametrize(("compiled", "shapes"), [(False, None), (True, {(4, 16)})])
def test_a_compiled_model_sees_ragged_samples_at_the_block_size(tmp_path, monkeypatch, compiled, shapes):
    """Each other length would be compiled."""
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: None)
    model, seen = GPT(CONFIG, seed=1), set()
    model.register_forward_pre_hook(lambda module, inputs: seen.add(tuple(inputs[0].shape)))
    options = {"model": model, "train_dataset": ROWS, "eval_dataset": ROWS, "micro_batch_size": 4}
    trainer = make_trainer(tmp_path, compile=compiled, **options)
    trainer.train()
    assert seen == shapes if shapes else len(seen) > 3
    assert math.isfinite(trainer.evaluate().loss)
