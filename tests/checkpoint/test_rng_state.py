import random

import numpy as np
import pytest
import torch

from homebrew.checkpoint.rng_state import restore_rng, rng_state
from homebrew.errors import CorruptCheckpoint


@pytest.fixture(autouse=True)
def restore_generators():
    state = rng_state()
    yield
    restore_rng(state)


def draws():
    """Draw from every generator; each normal draw of Python and NumPy caches a second one."""
    numpy = [np.random.rand(), np.random.randn()]  # noqa: NPY002 - libraries use it
    return [random.random(), random.gauss(0, 1), *numpy, *torch.rand(3).tolist(), *torch.randn(3).tolist()]


@pytest.mark.parametrize("num_draws", [0, 1, 2, 700])
def test_every_generator_is_restored(num_draws):
    for _ in range(num_draws):
        draws()
    state = rng_state()
    expected = [draws() for _ in range(3)]
    restore_rng(state)
    assert [draws() for _ in range(3)] == expected


def test_a_state_is_a_copy():
    state = rng_state()
    before = {name: tensor.clone() for name, tensor in state.items()}
    draws()
    assert all(torch.equal(state[name].nan_to_num(), before[name].nan_to_num()) for name in state)


@pytest.mark.parametrize("name", ["python", "python_gauss", "numpy", "numpy_gauss", "torch"])
@pytest.mark.parametrize("tensor", [None, torch.tensor([]), torch.tensor([1, 2]), torch.full((626,), 1 << 40)])
def test_an_invalid_state_is_refused(name, tensor):
    state = rng_state() | {name: tensor}
    if tensor is None:
        del state[name]
    with pytest.raises(CorruptCheckpoint, match="random states cannot be restored"):
        restore_rng(state)


@pytest.mark.parametrize("position", [-1, 625, 1 << 30])
def test_numpy_does_not_read_out_of_bounds(position):
    state = rng_state()
    state["numpy"][-2] = position
    with pytest.raises(CorruptCheckpoint, match=f"position {position}"):
        restore_rng(state)
