"""Reads samples. Their random numbers are a pure function of the seed and a sample's position in the run."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Subset

from homebrew.data.samples import Sample, as_sample
from homebrew.errors import DataError


class SeededDataset(Dataset[Sample]):
    """Seeds the global random generators of Python, NumPy and PyTorch before each sample is read.

    Therefore random augmentation does not depend on the number of ranks or workers, or on a resume. Afterwards the
    generators of this process are restored, so that the dataset does not affect the model's dropout.

    If the dataset implements `__getitems__`, the generators are seeded once per batch, by its first sample. Then the
    random numbers do depend on the micro-batch size and the number of ranks.
    """

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self._dataset = dataset
        self._seed = seed

    def __getitems__(self, batch: Sequence[Sequence[int]]) -> list[Sample]:
        """Read and convert samples, given as pairs of a position in the run and an index in the dataset."""
        samples = self._read(batch)
        if len(samples) != len(batch):
            raise DataError(
                f"The dataset's __getitems__ returned {len(samples)} samples for {len(batch)} indices. Return "
                f"one for each index."
            )
        names = [f"The dataset's sample {index}" for _, index in batch]
        return [as_sample(sample, name) for sample, name in zip(samples, names, strict=True)]

    def _read(self, batch: Sequence[Sequence[int]]) -> list[Any]:
        with restore_generators():
            if _reads_batches(type(self._dataset)):
                self._seed_generators(batch[0][0])
                return list(self._dataset.__getitems__([index for _, index in batch]))  # type: ignore[attr-defined]
            samples = []
            for position, index in batch:
                self._seed_generators(position)
                try:
                    samples.append(self._dataset[index])
                except StopIteration as error:  # Python would raise a RuntimeError, without its origin
                    raise DataError(
                        f"The dataset's sample {index} cannot be read: {error!r}. __getitem__ must return a sample for "
                        f"every index below the dataset's length."
                    ) from error
            return samples

    def _seed_generators(self, position: int) -> None:
        random.seed(f"{self._seed} {position}")
        torch.default_generator.manual_seed(random.getrandbits(63))
        np.random.seed(random.getrandbits(32))  # noqa: NPY002 - datasets draw from the global generator


def _reads_batches(dataset_class: type) -> bool:
    """Return whether to read a dataset with `__getitems__`: its class, or the nearest base, implements the method.

    If a class overrides only `__getitem__`, its samples are read one by one. So are those of a `Subset`, because they
    may be random.
    """
    nearest = next(cls for cls in dataset_class.__mro__ if vars(cls).keys() & {"__getitem__", "__getitems__"})
    return "__getitems__" in vars(nearest) and nearest is not Subset


@contextmanager
def restore_generators() -> Iterator[None]:
    """Restore the states of the global random generators of Python, NumPy and PyTorch (CPU) on exit."""
    python, numpy, pytorch = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(pytorch)
