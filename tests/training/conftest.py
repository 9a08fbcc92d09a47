"""Checkpoints of a few bytes."""

import pytest
import torch

from homebrew.training.checkpoint import CheckpointStore

STATE = {"identity": {"seed": 42}, "eval_loss": 2.5, "tokenizer": None}


def run_files(step):
    """The files of a whole run's checkpoint, their numbers telling the step."""
    return {
        "model": {"w": torch.full((3, 4), float(step)), "b": torch.full((5,), step, dtype=torch.bfloat16)},
        "optimizer": {"w//exp_avg": torch.full((3, 4), step / 2), "w//step": torch.tensor(float(step))},
        "rng-0": {"python": torch.tensor([3, step]), "python_gauss": torch.tensor([float("nan")])},
    }


def adapter_files(step):
    """The files of an adapter's."""
    return {"adapter": {"w": torch.full((3,), float(step))}, "optimizer": {"w//step": torch.tensor(float(step))}}


@pytest.fixture
def tiny():
    """What checkpoints hold: by kind the files of a step, and a state."""
    return {"full": run_files, "adapter": adapter_files, "state": STATE}


@pytest.fixture
def store(tmp_path):
    """An empty store."""
    store = CheckpointStore(tmp_path)
    store.prepare()
    return store
