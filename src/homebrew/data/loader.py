"""Batches for training and evaluation. The samples of a training step are a pure function of (seed, step)."""

import signal
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from homebrew.constants import IGNORE_INDEX
from homebrew.data.collate import Collate
from homebrew.data.dataset import TokenDataset
from homebrew.data.sample_rng import SeededDataset
from homebrew.data.sampler import sample_indices
from homebrew.errors import DataError

Batch = tuple[Tensor, Tensor]
"""(input_ids, targets), each (B, T), int64."""

MAX_RESIDENT_BYTES = 2 * 1024**3
"""Maximum size of a `TokenDataset` that is copied to the GPU's memory before training."""

MAX_GATHERED_TOKENS = 2**18
"""Maximum number of tokens gathered from a `TokenDataset` at a time. Gathering many batches saves kernel launches."""

SAMPLES_PER_BLOCK = 4096
"""Approximate number of samples in a `SampleBlock`. For a small model, computing one step's indices and copying them to
the device takes longer than the step."""


class SampleBlock(NamedTuple):
    """Samples of several batches."""

    positions: NDArray[np.int64]
    """Position of each sample in the run, (num_batches, B)."""
    indices: NDArray[np.int64]
    """Index of each sample in the dataset, (num_batches, B)."""


class StepLoader:
    """Loads the micro-batches of training steps for one rank.

    The run reads a sequence of epochs, each a random permutation of the dataset. A step reads the next
    `global_batch_size` samples of that sequence, for any number of ranks. Micro-batch m of rank r starts at sample
    (m · `num_ranks` + r) · `micro_batch_size` of the step.

    Args:
        dataset: A `TokenDataset`, or any map-style dataset, whose samples `as_sample` describes.
        seed: Random seed for the sample order and for random numbers that the dataset draws.
        global_batch_size: Number of samples in a step, over all ranks.
        micro_batch_size: Number of samples in a micro-batch of one rank.
        num_workers: Number of worker processes for a custom dataset, or a subclass of `TokenDataset`.
        collate: Makes the batches of a custom dataset, or a subclass of `TokenDataset`.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        num_ranks: int,
        device: torch.device,
        num_workers: int,
        timeout_seconds: float,
        collate: Collate,
    ) -> None:
        if type(dataset) is TokenDataset and device.type == "cuda" and dataset.nbytes <= MAX_RESIDENT_BYTES:
            dataset = dataset.to(device)
        self._dataset = dataset
        self._num_samples = len(dataset)  # type: ignore[arg-type]
        self._seed = seed
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        self._rank = rank
        self._num_ranks = num_ranks
        self._device = device
        self._num_workers = num_workers
        self._timeout_seconds = timeout_seconds if num_workers else 0
        self._collate = collate

    def steps(self, first_position: int) -> Generator[list[Batch]]:
        """Yield this rank's micro-batches of each step, without end.

        Args:
            first_position: Number of samples that all ranks have read before.
        """
        batches = _read_batches(
            self._dataset,
            self._blocks(first_position),
            self._device,
            seed=self._seed,
            collate=self._collate,
            num_workers=self._num_workers,
            timeout_seconds=self._timeout_seconds,
        )
        num_micro_batches = self._global_batch_size // (self._num_ranks * self._micro_batch_size)
        while True:
            yield [next(batches) for _ in range(num_micro_batches)]

    def _blocks(self, first_position: int) -> Iterator[SampleBlock]:
        num_steps = max(1, SAMPLES_PER_BLOCK // self._global_batch_size)
        size = num_steps * self._global_batch_size
        for start in count(first_position, size):
            positions = np.arange(start, start + size).reshape(-1, self._num_ranks, self._micro_batch_size)
            positions = positions[:, self._rank]
            indices = sample_indices(positions.ravel(), self._num_samples, self._seed)
            yield SampleBlock(positions, indices.reshape(positions.shape))


def eval_batches(
    dataset: Dataset[Any],
    *,
    micro_batch_size: int,
    rank: int,
    num_ranks: int,
    device: torch.device,
    collate: Collate,
    max_batches: int | None = None,
) -> Iterator[Batch]:
    """Yield this rank's batches for evaluation. Every sample is read on exactly one rank.

    All batches have the same number of samples, and all ranks the same number of batches. The last batches are padded
    with samples whose targets are `IGNORE_INDEX`. `max_batches` limits the number of batches on each rank.
    """
    num_samples = len(dataset)  # type: ignore[arg-type]
    num_batches = -(-num_samples // (micro_batch_size * num_ranks))
    positions = np.arange(num_batches * num_ranks * micro_batch_size)
    positions = positions.reshape(num_batches, num_ranks, micro_batch_size)[:max_batches, rank]
    block = SampleBlock(positions, np.minimum(positions, num_samples - 1))
    batches = _read_batches(dataset, iter([block]), device, seed=0, collate=collate, num_workers=0, timeout_seconds=0)
    for batch_positions, (input_ids, targets) in zip(positions, batches, strict=True):
        num_real = int((batch_positions < num_samples).sum())
        targets[num_real:] = IGNORE_INDEX
        yield input_ids, targets


@contextmanager
def explain_worker_errors(timeout_seconds: float) -> Iterator[None]:
    """Context manager that converts PyTorch's errors about data loader workers to `DataError`.

    PyTorch raises the error for a dead worker in the main thread at any time, also outside the data loader. So the
    training step must run inside this context, too.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith(("DataLoader worker (pid", "DataLoader timed out")):
            raise
        raise DataError(
            f"A data loader worker died or took over {timeout_seconds:g} seconds: {error}. Check the dataset's "
            f"__getitem__, or raise loader_timeout_seconds."
        ) from error


def _read_batches(
    dataset: Dataset[Any],
    blocks: Iterator[SampleBlock],
    device: torch.device,
    *,
    seed: int,
    collate: Collate,
    num_workers: int,
    timeout_seconds: float,
) -> Iterator[Batch]:
    """Yield each batch of the blocks, on the device."""
    if type(dataset) is TokenDataset:  # a subclass may override __getitem__
        return _gather_windows(dataset, blocks, device)
    data_loader = DataLoader(
        SeededDataset(dataset, seed),
        batch_sampler=_batch_sampler(blocks),
        collate_fn=collate,
        num_workers=num_workers,
        timeout=timeout_seconds,
        worker_init_fn=_ignore_signals,
        # Without this generator, the loader would draw from the global one, and dropout would differ after a resume.
        generator=torch.Generator(),
    )
    return _load_samples(data_loader, device)


def _gather_windows(dataset: TokenDataset, blocks: Iterator[SampleBlock], device: torch.device) -> Iterator[Batch]:
    for block in blocks:
        indices = _to_device(torch.from_numpy(block.indices), dataset.device)
        num_batches = max(1, MAX_GATHERED_TOKENS // (indices.shape[1] * dataset.block_size))
        for part in torch.split(indices, num_batches):
            shape = (*part.shape, dataset.block_size)
            input_ids, targets = (_to_device(ids, device).view(shape) for ids in dataset.batch(part.flatten()))
            yield from zip(input_ids, targets, strict=True)


def _load_samples(data_loader: DataLoader[Any], device: torch.device) -> Iterator[Batch]:
    batches: Any = iter(data_loader)
    try:
        with explain_worker_errors(data_loader.timeout):
            for input_ids, targets in batches:
                yield _to_device(input_ids, device), _to_device(targets, device)
    finally:
        if data_loader.num_workers:
            batches._shutdown_workers()
            for worker in batches._workers:
                worker.kill()  # a worker stopped by SIGSTOP ignores SIGTERM, and this process would wait for it at exit


def _ignore_signals(_worker_id: int) -> None:
    """Ignore the signals that Ctrl-C and schedulers send to all processes: the run needs workers until it has saved."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def _batch_sampler(blocks: Iterator[SampleBlock]) -> Iterator[list[list[int]]]:
    """Yield the samples of each batch. A sample is identified by its position in the run and its dataset index."""
    for block in blocks:
        yield from np.stack(block, axis=-1).tolist()  # (num_batches, B, 2)


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device, asynchronously if the device is a GPU."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
