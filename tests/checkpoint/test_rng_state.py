import random

import numpy as np
import pytest
import torch

from homebrew.checkpoint.rng_state import restore_rng, rng_state
from homebrew.errors import CorruptCheckpoint


@pytest.fixture(autouse=True)
def put_back():
    state = rng_state()
    yield
    restore_rng(state)


def draws():
    """Numbers of every kind, those that leave half a pair behind among them."""
    numpy = [np.random.rand(), np.random.randn()]  # noqa: NPY002 - what libraries draw from
    return [random.random(), random.gauss(0, 1), *numpy, *torch.rand(3).tolist(), *torch.randn(3).tolist()]


@pytest.mark.parametrize("drawn", [0, 1, 2, 700])
def test_every_generator_goes_on_where_it_was(drawn):
    for _ in range(drawn):
        draws()
    state = rng_state()
    first = [draws() for _ in range(3)]
    restore_rng(state)
    assert [draws() for _ in range(3)] == first


def test_a_state_is_a_copy():
    state = rng_state()
    before = {name: tensor.clone() for name, tensor in state.items()}
    draws()
    assert all(torch.equal(state[name].nan_to_num(), before[name].nan_to_num()) for name in state)


@pytest.mark.parametrize("name", ["python", "python_gauss", "numpy", "numpy_gauss", "torch"])
@pytest.mark.parametrize("tensor", [None, torch.tensor([]), torch.tensor([1, 2]), torch.full((626,), 1 << 40)])
def test_what_is_no_state(name, tensor):
    state = rng_state() | {name: tensor}
    if tensor is None:
        del state[name]
    with pytest.raises(CorruptCheckpoint, match="random states cannot be restored"):
        restore_rng(state)


@pytest.mark.parametrize("position", [-1, 625, 1 << 30])
def test_numpy_does_not_read_past_its_memory(position):
    state = rng_state()
    state["numpy"][-2] = position
    with pytest.raises(CorruptCheckpoint, match=f"position {position}"):
        restore_rng(state)
