"""Reproducible random numbers for datasets: a pure function of the seed and a sample's position in the run."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Subset


class SeededDataset(Dataset[Any]):
    """Seeds the global random generators of Python, NumPy and PyTorch before each sample is read.

    So random augmentation does not depend on the number of ranks or workers, or on a resume. Afterwards the generators
    of this process are restored, so that the dataset does not affect the model's dropout.

    If the dataset implements `__getitems__`, the generators are seeded once per batch, by its first sample. Then the
    random numbers do depend on the micro-batch size and the number of ranks. `Subset` also implements `__getitems__`,
    but its samples are read one by one.
    """

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self._dataset = dataset
        self._seed = seed

    def __getitems__(self, batch: Sequence[tuple[int, int]]) -> list[Any]:
        """Read samples, given as pairs of a position in the run and an index in the dataset."""
        with _restore_generators():
            if hasattr(self._dataset, "__getitems__") and type(self._dataset) is not Subset:
                self._seed_generators(batch[0][0])
                return list(self._dataset.__getitems__([index for _, index in batch]))
            samples = []
            for position, index in batch:
                self._seed_generators(position)
                samples.append(self._dataset[index])
            return samples

    def _seed_generators(self, position: int) -> None:
        random.seed(f"{self._seed} {position}")
        torch.default_generator.manual_seed(random.getrandbits(63))
        np.random.seed(random.getrandbits(32))  # noqa: NPY002 - datasets draw from the global generator


@contextmanager
def _restore_generators() -> Iterator[None]:
    """Restore the states of the global random generators on exit."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
