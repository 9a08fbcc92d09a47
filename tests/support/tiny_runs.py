"""Tiny training runs that tests share; not a test."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.utils.data import Dataset

from homebrew import GPTConfig, TokenDataset, Trainer, TrainerConfig
from homebrew.callbacks.base import Callback

CONFIG = GPTConfig(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=16)
ONE_LAYER = GPTConfig(block_size=16, vocab_size=50, n_layer=1, n_head=1, n_embd=8)


def random_tokens(count=1200, seed=0):
    return torch.randint(0, 50, (count,), generator=torch.Generator().manual_seed(seed))


def token_dataset(count=1200, seed=0):
    return TokenDataset.from_tokens(random_tokens(count, seed), block_size=16, vocab_size=50)


class UnevenTargets(Dataset):
    """64 samples with very different numbers of scored targets, some with none."""

    def __init__(self):
        rows = random_tokens(64 * 17, seed=3).view(64, 17)
        self.input_ids, self.targets = rows[:, :-1].clone(), rows[:, 1:].clone()
        for i, targets in enumerate(self.targets):
            targets[: (i * 7) % 17] = -100

    def __len__(self):
        return len(self.input_ids)

    def __getitem__(self, i):
        return self.input_ids[i], self.targets[i]


def make_trainer(
    output_dir,
    *,
    model=CONFIG,
    train_dataset=None,
    eval_dataset=None,
    optimizer=None,
    schedule=None,
    accelerator=None,
    callbacks=(),
    progress=True,
    **config,
):
    """Build a Trainer for six float32 steps of 8 sequences; `config` overrides fields of its TrainerConfig.

    `optimizer` is an optimizer, several, or the name of a built-in one.
    """
    defaults = {
        "max_steps": 6,
        "global_batch_tokens": 8 * 16,
        "micro_batch_size": 8,
        "log_every": 1,
        "mixed_precision": "no",  # the same numbers on every device
    }
    if isinstance(optimizer, str):
        config, optimizer = config | {"optimizer": optimizer}, None
    if optimizer is None:
        defaults["learning_rate"] = 1e-2
    return Trainer(
        model,
        token_dataset() if train_dataset is None else train_dataset,
        eval_dataset,
        config=TrainerConfig(output_dir=output_dir, **defaults | config),
        callbacks=callbacks,
        optimizer=optimizer,
        schedule=schedule,
        accelerator=accelerator,
        progress=progress,
    )


def weights(trainer):
    """Return a copy of the model's state dict, on the CPU."""
    return {name: value.to("cpu", copy=True) for name, value in trainer.model.state_dict().items()}


def matrices_and_vectors(parameters):
    """Return parameters in two lists: those for Muon, and the others."""
    parameters = list(parameters)
    return [p for p in parameters if p.dim() == 2], [p for p in parameters if p.dim() != 2]


def checkpoint_path(output_dir, step):
    return Path(output_dir) / "checkpoints" / f"step-{step:08}"


def checkpoint_tensors(output_dir, step):
    """Return all tensors of a checkpoint: weights, optimizer state, guard and random states."""
    files = sorted(checkpoint_path(output_dir, step).glob("*.safetensors"))
    return {f"{file.stem}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


def saved_steps(output_dir):
    return sorted(int(path.name.removeprefix("step-")) for path in (Path(output_dir) / "checkpoints").iterdir())


def equal(a, b):
    """Return whether two dicts of tensors are bitwise equal."""
    return a.keys() == b.keys() and all(
        a[name].shape == b[name].shape and torch.equal(_bytes(a[name]).cpu(), _bytes(b[name]).cpu()) for name in a
    )


def _bytes(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


class Recorder(Callback):
    """Records what the Trainer logs, evaluates, skips and saves."""

    def __init__(self):
        self.losses = {}
        """Loss by step."""
        self.metrics = {}
        """`StepMetrics` by step."""
        self.logged_at = []
        """Pairs of a logged step and the Trainer's step at that time."""
        self.evaluations = {}
        """`EvalMetrics` by step."""
        self.skipped = []
        """`SkippedStep`s."""
        self.saved = []
        """Saved steps."""

    def on_log(self, trainer, metrics):
        self.metrics[metrics.step] = metrics
        self.losses[metrics.step] = metrics.loss
        self.logged_at.append((metrics.step, trainer.step))

    def on_evaluate(self, trainer, metrics):
        self.evaluations[metrics.step] = metrics

    def on_step_skipped(self, trainer, steps):
        self.skipped += steps

    def on_save(self, trainer, path):
        self.saved.append(trainer.step)


class StopAt(Callback):
    """Stops training after the given step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, trainer):
        trainer.should_stop = trainer.step == self.step


class RaiseAt(Callback):
    """Raises an exception at the end of the given step."""

    def __init__(self, step, error):
        self.step = step
        self.error = error

    def on_step_end(self, trainer):
        if trainer.step == self.step:
            raise self.error
