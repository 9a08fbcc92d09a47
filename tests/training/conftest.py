"""Checkpoints of a few bytes."""

import pytest
import torch

from homebrew.training.checkpoint import CheckpointStore

STATE = {"identity": {"seed": 42}, "tokenizer": None}


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


def piece_files(step):
    """The files of a checkpoint that two processes write, the second one's last."""
    rows = torch.full((3, 4), float(step)).split(2)
    first, second = ({"w": part, "w[rows]": torch.tensor([at, 3])} for at, part in zip((0, 2), rows, strict=True))
    return {
        "model-00001-of-00002": first,
        "optimizer": {"w//step": torch.tensor(float(step))},
        "model-00002-of-00002": second,
    }


@pytest.fixture
def tiny():
    """What checkpoints hold: by kind the files of a step, and a state."""
    return {"full": run_files, "adapter": adapter_files, "pieces": piece_files, "state": STATE}


@pytest.fixture
def store(tmp_path):
    """An empty store."""
    store = CheckpointStore(tmp_path)
    store.prepare()
    return store
