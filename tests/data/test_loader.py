import gc
import os
import random
import signal
import subprocess
import sys
import time
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Dataset, Subset, random_split

from homebrew.data import loader as loader_module
from homebrew.data.collate import Collate
from homebrew.data.dataset import TokenDataset
from homebrew.data.loader import StepLoader, eval_batches, explain_worker_errors
from homebrew.data.sampler import sample_indices
from homebrew.data.token_file import write_tokens
from homebrew.errors import DataError

CPU = torch.device("cpu")
COLLATE = Collate(vocab_size=1000, block_size=8)
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
TOKENS = TokenDataset.from_tokens(torch.arange(401), 8)  # 50 windows; an id is its position


class CustomDataset(Dataset):
    """A map-style dataset whose sample i is i, i + 1, …; `transform` may change it."""

    def __init__(self, length=50, transform=lambda i, sample: sample):
        self.length, self.transform = length, transform

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        ids = torch.arange(index, index + 4)
        return self.transform(index, (ids, ids + 1))


DEFAULTS = {
    "seed": 3,
    "global_batch_size": 8,
    "collate": COLLATE,
    "device": CPU,
    "num_workers": 0,
    "timeout_seconds": 0,
}


def loader(dataset=TOKENS, rank=0, num_ranks=1, micro_batch_size=2, **options):
    return StepLoader(dataset, rank=rank, num_ranks=num_ranks, micro_batch_size=micro_batch_size, **DEFAULTS | options)


def sample_ids(step, seed=3):
    """The dataset indices of a step, (8,)."""
    return sample_indices(np.arange(8 * step, 8 * step + 8), 50, seed)


def ids(batches):
    """The input ids of a step, (global batch, T)."""
    return torch.cat([input_ids for input_ids, _ in batches])


def steps(number, first=0, **options):
    return [ids(step) for step in islice(loader(**options).steps(8 * first), number)]


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_a_step_has_the_same_samples_for_any_number_of_ranks(num_ranks):
    parts = [steps(15, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
    for step, shares in enumerate(zip(*parts, strict=True)):
        assert {len(share) for share in shares} == {8 // num_ranks}
        windows = sorted(int(row[0]) // 8 for share in shares for row in share)
        assert windows == sorted(sample_ids(step).tolist())


def test_micro_batches_alternate_between_ranks():
    expected = ids(next(loader(micro_batch_size=8).steps(40)))
    for rank in (0, 1):
        micro_batches = next(loader(rank=rank, num_ranks=2, micro_batch_size=2).steps(40))
        assert [len(input_ids) for input_ids, _ in micro_batches] == [2, 2]
        for m, (input_ids, targets) in enumerate(micro_batches):
            first = (2 * m + rank) * 2
            assert torch.equal(input_ids, expected[first : first + 2])
            assert torch.equal(targets, input_ids + 1)


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("dataset", [TOKENS, CustomDataset()])
def test_training_and_evaluation_batches_have_the_same_layout(dataset, micro):
    """Otherwise torch.compile would compile the model twice."""
    train_batch = next(loader(dataset, global_batch_size=micro, micro_batch_size=micro).steps(0))[0]
    eval_batch = next(eval_batches(dataset, micro_batch_size=micro, rank=0, num_ranks=1, device=CPU, collate=COLLATE))
    for tensor in (*train_batch, *eval_batch):
        assert tensor.stride() == (tensor.shape[1], 1)


def test_an_epoch_contains_every_sample_once():
    dataset = TokenDataset.from_tokens(torch.arange(48 * 8 + 1), 8)
    first_epoch = torch.cat(steps(6, dataset=dataset))[:, 0] // 8
    assert sorted(first_epoch.tolist()) == list(range(48))


@pytest.mark.parametrize("sizes", [(16, 8, 2, 6, 16), (2, 2, 12, 32), (48,)])
@pytest.mark.parametrize("dataset", [TokenDataset.from_tokens(torch.arange(48 * 8 + 1), 8), CustomDataset(48)])
def test_the_batch_size_may_change_within_an_epoch(dataset, sizes):
    read, scale = [], 8 if isinstance(dataset, TokenDataset) else 1
    for size in sizes:
        step = next(loader(dataset, global_batch_size=size).steps(len(read)))
        read += (ids(step)[:, 0] // scale).tolist()
    assert read == sample_indices(np.arange(48), 48, seed=3).tolist()


@pytest.mark.parametrize(
    "options", [{}, {"dataset": CustomDataset()}, {"dataset": CustomDataset(), "num_workers": 2, "timeout_seconds": 30}]
)
@pytest.mark.parametrize("first", [1, 7, 40])
def test_starting_at_a_step_equals_skipping_the_steps_before(options, first):
    expected = steps(first + 3, **options | {"num_workers": 0})[first:]
    assert all(map(torch.equal, steps(3, first, **options), expected))


@pytest.mark.parametrize("max_tokens", [1, 3 * 4 * 8, 2**18])
def test_gathering_several_batches_at_a_time_gives_the_same_batches(monkeypatch, max_tokens):
    monkeypatch.setattr(loader_module, "DataLoader", None)  # which reads sample by sample
    monkeypatch.setattr(loader_module, "MAX_GATHERED_TOKENS", max_tokens)
    monkeypatch.setattr(loader_module, "SAMPLES_PER_BLOCK", 40)  # five steps
    for step, micro_batches in enumerate(islice(loader(micro_batch_size=4).steps(0), 12)):
        for ids, (input_ids, targets) in zip(sample_ids(step).reshape(2, 4), micro_batches, strict=True):
            expected = TOKENS.batch(torch.from_numpy(ids))
            assert torch.equal(input_ids, expected[0])
            assert torch.equal(targets, expected[1])
            assert input_ids.is_contiguous()
            assert targets.is_contiguous()


@pytest.mark.parametrize(("micro_batch_size", "num_windows"), [(4, 1024), (2048, 2048)])
def test_at_most_2_to_the_18_tokens_or_one_batch_are_gathered_at_a_time(monkeypatch, micro_batch_size, num_windows):
    dataset, gathered, batch = TokenDataset.from_tokens(torch.arange(2561), 256), [], TokenDataset.batch
    monkeypatch.setattr(TokenDataset, "batch", lambda self, ids: gathered.append(len(ids)) or batch(self, ids))
    options = {"micro_batch_size": micro_batch_size, "global_batch_size": micro_batch_size}
    list(islice(loader(dataset, **options).steps(0), 2 * num_windows // micro_batch_size))
    assert gathered == [num_windows] * 2


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize(("global_batch_size", "block"), [(8, 40), (12, 36), (48, 48)])
def test_indices_of_several_steps_are_computed_at_a_time(monkeypatch, num_ranks, global_batch_size, block):
    num_computed, computed = [], []

    def record(positions, *args):
        num_computed.append(len(positions))
        computed.extend(positions.tolist())
        return sample_indices(positions, *args)

    monkeypatch.setattr(loader_module, "sample_indices", record)
    monkeypatch.setattr(loader_module, "SAMPLES_PER_BLOCK", 40)
    for rank in range(num_ranks):
        options = {"rank": rank, "num_ranks": num_ranks, "global_batch_size": global_batch_size}
        list(islice(loader(**options).steps(100), 2 * block // global_batch_size))
    assert num_computed == [block // num_ranks] * 2 * num_ranks
    assert sorted(computed) == list(range(100, 100 + 2 * block))


@pytest.mark.parametrize(
    ("dataset", "device", "nbytes", "copied"),
    [
        (TOKENS, "cuda", 2 * 1024**3, ["cuda"]),
        (TOKENS, "cuda", 2 * 1024**3 + 1, []),
        (TOKENS, "cpu", 1, []),
        (CustomDataset(), "cuda", 1, []),
    ],
)
def test_a_token_dataset_of_up_to_2_gib_is_copied_to_a_gpu(monkeypatch, dataset, device, nbytes, copied):
    copies = []
    monkeypatch.setattr(TokenDataset, "nbytes", nbytes)
    monkeypatch.setattr(TokenDataset, "to", lambda self, device: copies.append(device.type) or self)
    loader(dataset, device=torch.device(device))
    assert copies == copied


@pytest.mark.parametrize("dataset", [CustomDataset(), TOKENS])
def test_batches_are_copied_to_a_gpu_asynchronously_from_pinned_memory(monkeypatch, dataset):
    monkeypatch.setattr(loader_module, "MAX_RESIDENT_BYTES", 0)
    pinned, copied = [], []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self)

    def copy(self, device, *, non_blocking):
        assert non_blocking
        if device.type == "cuda":
            copied.append(self)
        return self

    monkeypatch.setattr(torch.Tensor, "to", copy)
    next(loader(dataset, device=torch.device("cuda")).steps(0))
    assert copied
    assert [id(tensor) for tensor in pinned] == [id(tensor) for tensor in copied]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("max_resident_bytes", [0, loader_module.MAX_RESIDENT_BYTES])
def test_token_files_and_memory_give_the_same_batches(tmp_path, monkeypatch, device, max_resident_bytes):
    monkeypatch.setattr(loader_module, "MAX_RESIDENT_BYTES", max_resident_bytes)
    write_tokens(tmp_path / "a.npy", np.arange(401), vocab_size=401)
    files = TokenDataset.from_shards(tmp_path / "a.npy", 8)
    expected = steps(10)
    for dataset in (files, TOKENS):
        actual = steps(10, dataset=dataset, device=torch.device(device))
        assert actual[0].device.type == device
        assert all(torch.equal(a.cpu(), b) for a, b in zip(actual, expected, strict=True))


def test_workers_give_the_same_batches():
    in_process, in_workers = (
        steps(9, dataset=CustomDataset()),
        steps(9, dataset=CustomDataset(), num_workers=2, timeout_seconds=30),
    )
    assert all(map(torch.equal, in_process, in_workers))
    assert [int(row[0]) for row in in_process[0]] == sample_ids(0).tolist()


def noisy(index, sample):
    """Adds random numbers from each of the global generators."""
    noise = torch.tensor([random.randrange(500), np.random.randint(500), int(torch.randint(500, ())), 0])  # noqa: NPY002
    return sample[0], sample[1] + noise


class BatchedDataset(CustomDataset):
    """A dataset with `__getitems__`, like those of Hugging Face's datasets."""

    def __getitems__(self, indices):
        return [noisy(index, self[index]) for index in indices]


def targets(number, first=0, **options):
    return [torch.cat([each for _, each in step]) for step in islice(loader(**options).steps(8 * first), number)]


class InheritedBatches(BatchedDataset):
    """A subclass that implements neither of the methods that read samples."""


class MaskedDataset(TokenDataset):
    """Ignores the first half of the targets."""

    def __getitem__(self, index):
        input_ids, targets = super().__getitem__(index)
        targets[:4] = -100
        return input_ids, targets


class MaskedBatches(TokenDataset):
    """The same, in the method that reads a batch."""

    def batch(self, indices):
        input_ids, targets = super().batch(indices)
        targets[:, :4] = -100
        return input_ids, targets


class MaskedAgain(BatchedDataset):
    """The same for a dataset that inherits its own `__getitems__`."""

    def __getitem__(self, index):
        input_ids = torch.arange(index, index + 8)
        return input_ids, input_ids.index_fill(0, torch.arange(4), -100)


class MaskedView(CustomDataset):
    """The same for a dataset that forwards everything else to another one."""

    def __getitem__(self, index):
        return MaskedAgain.__getitem__(self, index)

    def __getattr__(self, name):
        return getattr(BatchedDataset(), name)


@pytest.mark.parametrize(
    "dataset",
    [
        MaskedDataset.from_tokens(torch.arange(401), 8),
        MaskedBatches.from_tokens(torch.arange(401), 8),
        MaskedAgain(),
        MaskedView(),
    ],
    ids=lambda dataset: type(dataset).__name__,
)
def test_an_overridden_method_of_a_dataset_is_used(dataset):
    for targets in (
        next(loader(dataset, micro_batch_size=8).steps(0))[0][1],
        next(eval_batches(dataset, micro_batch_size=8, rank=0, num_ranks=1, device=CPU, collate=COLLATE))[1],
    ):
        assert (targets[:, :4] == -100).all()
        assert (targets[:, 4:] >= 0).all()


NOISY = CustomDataset(transform=noisy)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_random_numbers_of_a_dataset_depend_on_seed_and_step_only(num_workers):
    options = {"num_workers": num_workers, "timeout_seconds": 30 * bool(num_workers)}
    for dataset in (NOISY, BatchedDataset()):
        expected = targets(9, dataset=dataset)
        random.seed(1)
        torch.manual_seed(1)
        repeated = targets(9, dataset=dataset, **options)
        assert all(map(torch.equal, repeated, expected))
        assert all(map(torch.equal, targets(4, 5, dataset=dataset, **options), expected[5:]))
        assert not any(map(torch.equal, targets(9, dataset=dataset, seed=4, **options), expected))
    noise = torch.cat([each[:, :3] - each[:, 3:] for each in targets(9, dataset=NOISY)])
    assert len({tuple(row) for row in noise.tolist()}) == 72, "random numbers differ between samples and between epochs"


def test_random_numbers_of_a_sample_depend_on_the_seed():
    one_sample = CustomDataset(1, noisy)  # its order is the same for every seed
    assert not torch.equal(*(targets(1, dataset=one_sample, seed=seed)[0] for seed in (3, 4)))


@pytest.mark.parametrize("dataset", [BatchedDataset(), InheritedBatches()])
def test_a_dataset_that_reads_batches_is_seeded_by_the_first_sample_of_each(dataset):
    assert not torch.equal(*(targets(1, dataset=each)[0] for each in (NOISY, dataset)))
    one_by_one = [targets(9, dataset=each, micro_batch_size=1) for each in (NOISY, dataset)]
    assert all(map(torch.equal, *one_by_one))


@pytest.mark.parametrize("dataset", [NOISY, Subset(NOISY, range(50)), random_split(NOISY, [40, 10])[0]])
def test_random_numbers_of_a_dataset_do_not_depend_on_the_number_of_ranks(dataset):
    expected = targets(3, dataset=dataset, micro_batch_size=8)
    parts = [targets(3, dataset=dataset, rank=rank, num_ranks=2, micro_batch_size=4) for rank in range(2)]
    assert all(torch.equal(torch.cat(shares), step) for *shares, step in zip(*parts, expected, strict=True))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_reading_does_not_change_the_global_generators(num_workers):
    before = random.getstate(), str(np.random.get_state()), torch.get_rng_state()  # noqa: NPY002
    steps(3, dataset=NOISY, num_workers=num_workers, timeout_seconds=30)
    list(eval_batches(NOISY, micro_batch_size=4, rank=0, num_ranks=1, device=CPU, collate=COLLATE))
    after = random.getstate(), str(np.random.get_state()), torch.get_rng_state()  # noqa: NPY002
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])


def kill(index, sample):
    os.kill(os.getpid(), signal.SIGKILL)


def hang(index, sample):
    time.sleep(600)


@pytest.mark.filterwarnings("ignore:Exception ignored in. .socket")  # its other end was in the worker
def test_a_killed_worker_raises():
    dataset = CustomDataset(transform=lambda i, sample: kill(i, sample) if i == 7 else sample)
    with pytest.raises(DataError, match="worker died or took over 30 seconds"):
        steps(9, dataset=dataset, num_workers=2, timeout_seconds=30)
    gc.collect()  # the socket, here rather than in another test


def test_a_hanging_worker_raises_after_the_timeout(monkeypatch):
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
    dataset = CustomDataset(transform=lambda i, sample: hang(i, sample) if i == 7 else sample)
    with pytest.raises(DataError, match=r"took over 0\.5 seconds.*raise loader_timeout_seconds"):
        steps(9, dataset=dataset, num_workers=2, timeout_seconds=0.5)


STOPPED = """
import os, signal, torch
from homebrew.data.collate import Collate
from homebrew.data.loader import StepLoader
from homebrew.errors import DataError
torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.2
class Stopping(torch.utils.data.Dataset):
    def __len__(self):
        return 8
    def __getitem__(self, index):
        print(os.getpid(), flush=True)
        os.kill(os.getpid(), signal.SIGSTOP)
options = dict(global_batch_size=2, micro_batch_size=2, rank=0, num_ranks=1, device=torch.device("cpu"),
    collate=Collate(9, 8))
try:
    next(StepLoader(Stopping(), seed=0, num_workers=1, timeout_seconds=3, **options).steps(0))
except DataError:
    print("error", flush=True)
"""


def test_a_stopped_worker_does_not_outlive_the_process():
    done = subprocess.run([sys.executable, "-c", STOPPED], capture_output=True, text=True, timeout=60)
    worker, error = done.stdout.split()
    assert (error, done.returncode, done.stderr) == ("error", 0, "")
    with pytest.raises(ProcessLookupError):
        os.kill(int(worker), 0)


def test_a_worker_that_dies_during_a_step_raises_there():
    batches = loader(CustomDataset(), num_workers=1, timeout_seconds=30).steps(0)
    next(batches)
    (worker,) = torch.multiprocessing.active_children()

    def step():
        with explain_worker_errors(30):
            os.kill(worker.pid, signal.SIGKILL)
            time.sleep(10)

    with pytest.raises(DataError, match="worker died"):
        step()
    batches.close()


def test_workers_ignore_signals_that_a_run_handles():
    """A terminal and a scheduler send them to every process, but the run still needs its workers to finish a step."""
    options = {"dataset": CustomDataset(), "timeout_seconds": 30}
    batches = loader(num_workers=1, **options).steps(0)
    read = [ids(next(batches))]
    (worker,) = torch.multiprocessing.active_children()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        os.kill(worker.pid, number)
    read += [ids(next(batches)) for _ in range(8)]
    assert all(map(torch.equal, read, steps(9, **options)))
    batches.close()


def test_workers_end_with_the_steps():
    batches = loader(CustomDataset(), num_workers=2, timeout_seconds=30).steps(0)
    next(batches)
    assert len(torch.multiprocessing.active_children()) == 2
    del batches
    assert torch.multiprocessing.active_children() == []


def raising(index, sample):
    raise RuntimeError(f"error in sample {index}")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_errors_of_the_dataset_are_not_converted(num_workers):
    with pytest.raises(RuntimeError, match="error in sample") as caught:
        steps(1, dataset=CustomDataset(transform=raising), num_workers=num_workers, timeout_seconds=30)
    assert not isinstance(caught.value, DataError)


def exhausted(index, sample):
    raise StopIteration


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_exhausted_iterator_in_the_dataset_is_named(num_workers):
    """Otherwise Python reports that a generator raised it."""
    with pytest.raises(DataError, match=r"sample \d+ cannot be read: StopIteration"):
        steps(1, dataset=CustomDataset(transform=exhausted), num_workers=num_workers, timeout_seconds=30)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (lambda ids: (ids + 1000, ids), "A batch has input_ids from .* to .*, but the model's vocabulary is 0 to 999"),
        (lambda ids: (ids, ids - 100), "targets from -"),
        (lambda ids: (ids.repeat(3), ids.repeat(3)), "A sample has 12 tokens, but the model's block_size is 8"),
        (lambda ids: (ids, ids[1:]), "sample 7 has 4 input_ids, 3 targets, but these must be of equal length"),
        (lambda ids: (ids.float(), ids), "sample 7 is .* but must be"),
        (lambda ids: None, "sample 7 is None, but must be"),
    ],
)
def test_invalid_samples_raise_in_any_batch(transform, message, num_workers):
    dataset = CustomDataset(transform=lambda i, sample: transform(sample[0]) if i == 7 else sample)
    with pytest.raises(DataError, match=message):
        steps(9, dataset=dataset, num_workers=num_workers, timeout_seconds=30)


def test_ignored_targets_are_valid():
    dataset = CustomDataset(transform=lambda i, sample: (sample[0], torch.full((4,), -100)))
    assert len(steps(3, dataset=dataset)) == 3


def test_an_id_outside_the_vocabulary_of_a_token_file_raises(tmp_path):
    write_tokens(tmp_path / "a.npy", np.arange(401), vocab_size=401)
    dataset = TokenDataset.from_shards(tmp_path / "a.npy", 8)
    with (tmp_path / "a.npy").open("r+b") as file:
        file.seek(-100, 2)
        file.write(b"\xff\xff")
    with pytest.raises(DataError, match="token id 65535"):
        steps(7, dataset=dataset)


@given(
    samples=st.integers(1, 30), micro=st.integers(1, 5), ranks=st.integers(1, 4), custom=st.booleans(),
    limit=st.none() | st.integers(1, 3),
)  # fmt: skip
def test_evaluation_scores_every_sample_once(samples, micro, ranks, custom, limit):
    dataset = CustomDataset(samples) if custom else TokenDataset.from_tokens(torch.arange(samples * 4 + 1), 4)
    options = {
        "micro_batch_size": micro,
        "num_ranks": ranks,
        "device": CPU,
        "collate": COLLATE,
        "max_batches": limit,
    }
    parts = [list(eval_batches(dataset, rank=rank, **options)) for rank in range(ranks)]
    assert len({len(part) for part in parts}) == 1, "ranks need equal numbers of batches for their collectives"
    batches = [batch for turn in zip(*parts, strict=True) for batch in turn]
    assert {input_ids.shape for input_ids, _ in batches} == {(micro, 4)}
    assert len({targets.stride() for _, targets in batches}) == 1, "torch.compile would compile the model again"
    assert all((input_ids >= 0).all() for input_ids, _ in batches), "the model also reads the padding"
    scored = [row.tolist() for _, targets in batches for row in targets if (row != -100).all()]
    unscored = [row for _, targets in batches for row in targets if (row == -100).any()]
    seen = samples if limit is None else min(samples, limit * micro * ranks)
    assert scored == [dataset[i][1].tolist() for i in range(seen)]
    assert all((row == -100).all() for row in unscored)
