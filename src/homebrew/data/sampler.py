"""Random sample order as a pure function of (seed, position), in constant memory."""

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 8
"""With four rounds, neighbouring samples were consecutive a third more often than in a random permutation."""


def sample_indices(positions: NDArray[np.int64], num_samples: int, seed: int) -> NDArray[np.int64]:
    """Return the samples at the given positions of an endless sequence of epochs.

    Each epoch is a different random permutation. A Feistel network permutes the range up to the next power of four.
    Values outside the dataset are permuted again until they fall inside (cycle-walking; Black and Rogaway 2002,
    "Ciphers with Arbitrary Finite Domains").

    Positions, (n,), int64, are counted from 0 over all epochs. The results are dataset indices, (n,), int64.
    """
    epochs, values = np.divmod(positions, num_samples)
    half = (int(num_samples - 1).bit_length() + 1) // 2
    keys = _mix(_mix(np.array([seed], np.uint64)) ^ epochs.astype(np.uint64))
    values = values.astype(np.uint64)
    outside = np.arange(len(values))
    while len(outside):
        values[outside] = _feistel(values[outside], keys[outside], half)
        outside = outside[values[outside] >= num_samples]
    return values.astype(np.int64)


def _feistel(values: NDArray[np.uint64], keys: NDArray[np.uint64], half: int) -> NDArray[np.uint64]:
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> bits, values & mask
    for i in range(_ROUNDS):
        left, right = right, left ^ (_mix(right ^ _mix(keys + np.uint64(i + 1))) & mask)
    return (left << bits) | right


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hash integers with the finalizer of SplitMix64 (Steele et al. 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
