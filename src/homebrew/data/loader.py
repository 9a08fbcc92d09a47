"""A step's micro-batches for one process: which ones is a pure function of (seed, step)."""

import signal
from collections.abc import Callable, Generator, Iterator, Sized
from contextlib import contextmanager
from itertools import count
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from homebrew.constants import IGNORE_INDEX
from homebrew.data.dataset import TokenDataset
from homebrew.data.sample_rng import DrawingDataset
from homebrew.data.sampler import sample_indices
from homebrew.data.validation import check_ids, check_sample
from homebrew.errors import DataError

Batch = tuple[Tensor, Tensor]
"""(input_ids, targets), each (B, T), int64."""

RESIDENT_BYTES = 2 * 1024**3
"""A `TokenDataset` of at most this size is trained on from the GPU's own memory."""

TOKENS_AT_ONCE = 2**18
"""A `TokenDataset` gives several batches at a time, up to this size: cutting out one takes several kernels."""

IDS_AT_ONCE = 4096
"""Sample ids worked out, and sent to the device, at a time: one small step's at a time take longer than the step."""


class StepLoader:
    """The batches of a run's steps.

    Sample j of step k stands at position k · `global_batch_size` + j of the epochs' permutations, however many
    processes there are; micro-batch m of rank r takes j from (m · `num_ranks` + r) · `micro_batch_size` on.

    Args:
        dataset: a `TokenDataset`, or any map-style dataset of (input_ids, targets).
        seed: of the order, and of what the dataset draws at random.
        global_batch_size: samples a step, over all ranks.
        micro_batch_size: samples a rank takes at once.
        rank: of this process.
        num_ranks: processes that share a step.
        device: where batches go.
        num_workers: processes that read ahead.
        timeout_seconds: how long to wait for one.
        vocab_size: ids must be below it.
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
        num_workers: int = 0,
        timeout_seconds: float = 0.0,
        vocab_size: int,
    ) -> None:
        self._num_samples = len(cast("Sized", dataset))
        self._seed = seed
        self._global_batch_size = global_batch_size
        self._shape = (-1, num_ranks, micro_batch_size)
        self._rank = rank
        self._accumulation = global_batch_size // (num_ranks * micro_batch_size)
        if isinstance(dataset, TokenDataset) and device.type == "cuda" and dataset.nbytes <= RESIDENT_BYTES:
            dataset = dataset.to(device)
        self._read = reader(dataset, device, num_workers, timeout_seconds, vocab_size, seed)

    def sample_ids(self, step: int, num_steps: int = 1) -> NDArray[np.int64]:
        """The samples of a step and of those after it, over all ranks, (num_steps · global_batch_size,)."""
        first, count = step * self._global_batch_size, num_steps * self._global_batch_size
        return sample_indices(np.arange(first, first + count, dtype=np.int64), self._num_samples, self._seed)

    def steps(self, first_step: int) -> Generator[list[Batch]]:
        """This rank's micro-batches of `first_step` and of every step after it."""
        batches = self._read(self._blocks(first_step))
        while True:
            yield [next(batches) for _ in range(self._accumulation)]

    def _blocks(self, first_step: int) -> Iterator["Block"]:
        num_steps = max(1, IDS_AT_ONCE // self._global_batch_size)
        for step in count(first_step, num_steps):
            ids = self.sample_ids(step, num_steps)
            positions = np.arange(len(ids)) + step * self._global_batch_size
            yield positions.reshape(self._shape)[:, self._rank], ids.reshape(self._shape)[:, self._rank]


def eval_batches(
    dataset: Dataset[Any],
    *,
    micro_batch_size: int,
    rank: int,
    num_ranks: int,
    device: torch.device,
    vocab_size: int,
    max_batches: int | None = None,
) -> Iterator[Batch]:
    """Every sample once over all ranks, in batches of one shape, equally many on each rank.

    Where there are no samples left, the batch is filled up with targets that are not scored.

    Args:
        dataset: as for `StepLoader`.
        micro_batch_size: samples in a batch.
        rank: of this process.
        num_ranks: processes that share the work.
        device: where batches go.
        vocab_size: ids must be below it.
        max_batches: on each rank; all if None.
    """
    samples = len(cast("Sized", dataset))
    num_batches = -(-samples // (micro_batch_size * num_ranks))
    positions = np.arange(num_batches * num_ranks * micro_batch_size)
    mine = positions.reshape(num_batches, num_ranks, micro_batch_size)[:max_batches, rank]
    batches = reader(dataset, device, 0, 0.0, vocab_size, 0)(iter([(mine, np.minimum(mine, samples - 1))]))
    for row, (input_ids, targets) in zip(mine, batches, strict=True):
        targets[int((row < samples).sum()) :] = IGNORE_INDEX
        yield input_ids, targets


Block = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Positions in the run, and the ids of the samples there, each (n, B)."""

Reader = Callable[[Iterator[Block]], Iterator[Batch]]
"""Turns blocks into batches on the device, one for each row."""


def reader(
    dataset: Dataset[Any], device: torch.device, num_workers: int, timeout_seconds: float, vocab_size: int, seed: int
) -> Reader:
    """How a dataset is read."""
    if isinstance(dataset, TokenDataset):
        return lambda blocks: _gather(dataset, blocks, device)
    drawing = DrawingDataset(dataset, seed)
    return lambda blocks: _load(drawing, blocks, device, num_workers, timeout_seconds, vocab_size)


def _gather(dataset: TokenDataset, blocks: Iterator[Block], device: torch.device) -> Iterator[Batch]:
    for _, ids in blocks:
        batches_at_once = max(1, TOKENS_AT_ONCE // (ids.shape[1] * dataset.block_size))
        for rows in torch.split(_send(torch.from_numpy(ids), dataset.device), batches_at_once):
            shape = (*rows.shape, dataset.block_size)
            input_ids, targets = (_send(side, device).view(shape) for side in dataset.batch(rows.flatten()))
            yield from zip(input_ids, targets, strict=True)


def _load(
    dataset: DrawingDataset,
    blocks: Iterator[Block],
    device: torch.device,
    num_workers: int,
    timeout_seconds: float,
    vocab_size: int,
) -> Iterator[Batch]:
    loader = DataLoader(
        dataset,
        batch_sampler=cast("Any", _Rows(blocks)),
        collate_fn=_Collate(vocab_size),
        num_workers=num_workers,
        timeout=timeout_seconds if num_workers else 0,
        worker_init_fn=_heed_no_signals,
        # Its own generator: a loader without one draws from the global state, and dropout would differ on resume.
        generator=torch.Generator(),
    )
    batches: Any = iter(loader)
    try:
        with explain_worker_errors(timeout_seconds):
            for input_ids, targets in batches:
                yield _send(input_ids, device), _send(targets, device)
    finally:
        if num_workers:
            batches._shutdown_workers()
            for worker in batches._workers:
                worker.kill()  # one that was stopped heeds no SIGTERM, and this process would wait for it at its end


def _heed_no_signals(_worker: int) -> None:
    """Ctrl-C, and many a scheduler's SIGTERM, come to workers too, whom the run needs until it has saved."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


@contextmanager
def explain_worker_errors(timeout_seconds: float) -> Iterator[None]:
    """Within it, PyTorch's word of a loader worker that died or keeps silent is a `DataError`.

    Of a death the word comes at once, wherever the main thread is: a run's steps belong within this.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith(("DataLoader worker (pid", "DataLoader timed out")):
            raise
        raise DataError(
            f"A loader worker died or took over {timeout_seconds:g} seconds: {error}. Look at the dataset's "
            f"__getitem__, or raise loader_timeout_seconds."
        ) from error


class _Rows:
    """Positions and sample ids as the batch sampler a DataLoader takes."""

    def __init__(self, blocks: Iterator[Block]) -> None:
        self._blocks = blocks

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for positions, ids in self._blocks:
            for row in zip(positions.tolist(), ids.tolist(), strict=True):
                yield list(zip(*row, strict=True))


class _Collate:
    """Samples of the user's own dataset as one checked batch."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def __call__(self, samples: list[Batch]) -> Batch:
        for sample in samples:
            check_sample(sample, "A sample")
        lengths = {len(input_ids) for input_ids, _ in samples}
        if len(lengths) != 1:
            raise DataError(
                f"Samples of one batch have {sorted(lengths)} tokens: all must be equally long; fill up the shorter, "
                f"with {IGNORE_INDEX} in the targets."
            )
        input_ids, targets = (torch.stack(rows) for rows in zip(*samples, strict=True))
        check_ids(input_ids, targets, "A batch", self._vocab_size)
        return input_ids, targets


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy without waiting where the device can."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
