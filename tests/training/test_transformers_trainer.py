"""Twenty steps of the Trainer against transformers' own Trainer: the same model, data and order."""

import numpy as np
import pytest
import torch
import transformers
from language_models import transformers_model
from tiny_runs import Recorder, make_trainer, random_tokens

from homebrew import DictDataset
from homebrew.data.sampler import sample_indices

ROWS = random_tokens(64 * 17, seed=3).view(64, 17)
LABELS = ROWS.masked_fill(torch.rand(64, 17, generator=torch.Generator().manual_seed(0)) < 0.2, -100)
STEPS = 20


class InOrder(transformers.Trainer):
    """Reads the samples in order, and records the loss of each step."""

    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def training_step(self, *arguments, **options):
        loss = super().training_step(*arguments, **options)
        self.losses = [*getattr(self, "losses", ()), loss.item()]
        return loss


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt_neox"])
def test_the_losses_are_those_of_the_trainer_of_transformers(tmp_path, name):
    rows = [{"input_ids": ids, "labels": labels} for ids, labels in zip(ROWS, LABELS, strict=True)]
    settings = transformers.TrainingArguments(
        tmp_path / "transformers",
        max_steps=STEPS,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        weight_decay=0.1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    order = sample_indices(np.arange(STEPS * 8), len(rows), 42)
    theirs = InOrder(
        transformers_model(name, max_position_embeddings=32), settings, train_dataset=[rows[i] for i in order]
    )
    theirs.train()
    recorder = Recorder()
    make_trainer(
        tmp_path / "homebrew",
        model=transformers_model(name, max_position_embeddings=32),
        train_dataset=DictDataset(rows, labels_are_shifted=False),
        max_steps=STEPS,
        global_batch_tokens=8 * 17,
        micro_batch_size=4,
        weight_decay=0.1,
        schedule=lambda step: 1.0,
        callbacks=[recorder],
        progress=False,
    ).train()
    assert list(recorder.losses.values()) == pytest.approx(theirs.losses, abs=1e-5)
