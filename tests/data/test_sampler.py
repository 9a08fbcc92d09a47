import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from homebrew.data.sampler import sample_indices


@given(num_samples=st.integers(1, 3000), seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 2**20))
def test_an_epoch_contains_every_sample_once(num_samples, seed, epoch):
    positions = np.arange(epoch * num_samples, (epoch + 1) * num_samples)
    assert sorted(sample_indices(positions, num_samples, seed).tolist()) == list(range(num_samples))


@given(
    positions=st.lists(st.integers(0, 2**40), max_size=20), num_samples=st.integers(1, 2**40), seed=st.integers(0, 99)
)
def test_a_sample_depends_on_its_position_only(positions, num_samples, seed):
    together = sample_indices(np.array(positions, np.int64), num_samples, seed)
    alone = [int(sample_indices(np.array([p]), num_samples, seed)[0]) for p in positions]
    assert together.tolist() == alone
    assert all(0 <= i < num_samples for i in alone)


def test_every_epoch_and_seed_has_a_different_order():
    def order(epoch, seed):
        return tuple(sample_indices(np.arange(epoch * 1000, (epoch + 1) * 1000), 1000, seed).tolist())

    assert len({order(epoch, seed) for epoch in range(10) for seed in range(10)}) == 100
    assert order(0, 0) != tuple(range(1000))


@pytest.mark.parametrize(
    ("num_samples", "seed", "order"),
    [
        (1, 42, [0, 0, 0]),
        (3, 42, [2, 1, 0, 0, 1, 2, 0, 1, 2, 0, 2, 1]),
        (10, 42, [0, 8, 5, 1, 9, 7, 4, 2, 6, 3, 1, 3]),
        (2**32 + 1, 2**64 - 1, [3827590502, 708643511, 3418401892, 2682956030]),
    ],
)
def test_the_order_never_changes(num_samples, seed, order):
    """A resumed run must continue with the same samples, also after an update of homebrew."""
    assert sample_indices(np.arange(len(order)), num_samples, seed).tolist() == order


@pytest.mark.parametrize("num_samples", [50, 64, 65])
def test_samples_are_uniformly_distributed(num_samples):
    epochs = 20_000
    orders = sample_indices(np.arange(epochs * num_samples), num_samples, 7).reshape(epochs, num_samples)
    expected = epochs / num_samples
    for position in (0, 1, num_samples // 2, num_samples - 1):
        chi2 = float(((np.bincount(orders[:, position], minlength=num_samples) - expected) ** 2 / expected).sum())
        freedom = num_samples - 1
        assert abs(chi2 - freedom) < 5 * (2 * freedom) ** 0.5
    neighbours = (orders[:, 1:] == orders[:, :-1] + 1).mean() * num_samples
    assert neighbours == pytest.approx(1, abs=0.02), "neighbours are consecutive as often as any two samples"
