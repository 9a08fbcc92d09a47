"""What a dataset draws at random: a pure function of the seed and a sample's position, as its order is."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Subset


class DrawingDataset(Dataset[Any]):
    """A dataset whose samples, where they are changed by chance, are so whoever reads them, and at any time.

    Each starts from random states of its own, so that neither the number of processes or of loader workers nor a
    resume changes what it draws from Python's, NumPy's and PyTorch's global generators. Those of this process are
    afterwards as they were: a run's dropout does not notice that a dataset draws.

    Of a dataset that itself fetches many samples at once (`__getitems__`) all of one fetch share a start, the first
    one's: there the size of micro-batches and the number of processes do matter. PyTorch's `Subset` has that method
    too, and is fetched from one by one.

    Args:
        dataset: map-style.
        seed: of the draws.
    """

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self._dataset = dataset
        self._seed = seed

    def __getitems__(self, row: Sequence[tuple[int, int]]) -> list[Any]:
        """Samples by position in the run and index in the dataset."""
        with _put_back():
            if hasattr(self._dataset, "__getitems__") and type(self._dataset) is not Subset:
                self._start(row[0][0])
                return list(self._dataset.__getitems__([index for _, index in row]))
            samples = []
            for position, index in row:
                self._start(position)
                samples.append(self._dataset[index])
            return samples

    def _start(self, position: int) -> None:
        random.seed(f"{self._seed} {position}")
        torch.default_generator.manual_seed(random.getrandbits(63))
        np.random.seed(random.getrandbits(32))  # noqa: NPY002 - what datasets draw from


@contextmanager
def _put_back() -> Iterator[None]:
    """Afterwards the generators are where they were."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
