import random
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset

from homebrew.data.dataset import TokenDataset
from homebrew.data.validation import check_dataset
from homebrew.errors import DataError

IDS = torch.arange(8)


class CustomDataset(Dataset):
    """A map-style dataset that repeats one sample."""

    def __init__(self, sample, length=1):
        self.sample, self.length = sample, length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return self.sample


class Endless(IterableDataset):
    def __iter__(self):
        yield IDS, IDS

    def __len__(self):
        return 5


class Unreadable(CustomDataset):
    """Fails for its second sample."""

    def __getitem__(self, index):
        return [self.sample][index]


def attributes(**values):
    dataset = CustomDataset((IDS, IDS))
    vars(dataset).update(values)
    return dataset


class NoLength(Dataset):
    def __getitem__(self, index):
        return IDS, IDS


@pytest.mark.parametrize(
    "dataset",
    [
        TokenDataset.from_tokens(torch.arange(9), 8),
        CustomDataset((IDS, IDS)),
        CustomDataset([IDS, IDS]),
        CustomDataset((IDS, torch.full((8,), -100))),
        torch.utils.data.TensorDataset(IDS[None], IDS[None]),
        attributes(vocab_size=np.int64(9), bytes_per_token=None),
    ],
)
def test_valid_datasets_pass(dataset):
    assert check_dataset(dataset, "train_dataset", block_size=8, vocab_size=9) == [8]


@pytest.mark.parametrize(
    ("lengths", "found"), [([5], [5]), ([5] * 40, [5]), ([6, 5], [5, 6]), ([5] * 20 + [3] * 10 + [5] * 20, [3, 5])]
)
@pytest.mark.parametrize("limits", [{"block_size": 16, "vocab_size": 9}, {"block_size": None, "vocab_size": None}])
def test_the_lengths_of_samples_all_over_the_dataset_are_returned(lengths, found, limits):
    dataset = [(IDS[:1].repeat(length), IDS[:1].repeat(length)) for length in lengths]
    assert check_dataset(dataset, "train_dataset", **limits) == found


class Draws(CustomDataset):
    """Draws a random number for every sample, and then perhaps fails."""

    def __init__(self, draw, sample):
        super().__init__(sample, length=3)
        self.draw = draw

    def __getitem__(self, index):
        self.draw()
        return self.sample[0], self.sample[1]


@pytest.mark.parametrize("draw", [random.random, np.random.rand, lambda: torch.rand(1)])
@pytest.mark.parametrize("sample", [(IDS, IDS), (IDS,)], ids=["valid", "fails"])
def test_a_check_does_not_change_the_global_generators(draw, sample):
    before = random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()  # noqa: NPY002
    with nullcontext() if len(sample) == 2 else pytest.raises(DataError, match="cannot be read"):
        check_dataset(Draws(draw, sample), "dataset", block_size=8, vocab_size=9)
    after = random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()  # noqa: NPY002
    assert after == before


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (CustomDataset((IDS, IDS), 0), "is empty"),
        (NoLength(), "NoLength.*map-style"),
        (Endless(), "Endless.*map-style.*resumes.*list.dataset.*from_shards"),
        (iter([IDS]), "list_iterator.*map-style"),
        (CustomDataset((IDS,)), "must be .input_ids"),
        (CustomDataset({"input_ids": IDS, "labels": IDS}), "DictDataset.dataset, labels_are_shifted=False"),
        (CustomDataset((torch.arange(9), torch.arange(9))), "9 tokens, but the model's block_size is 8"),
        (CustomDataset((IDS + 2, IDS)), "input_ids from 2 to 9, but the model's vocabulary is 0 to 8"),
        (CustomDataset((IDS, IDS - 1)), "targets from -1 to 6"),
        (CustomDataset((IDS - 100, IDS)), "input_ids from -100"),
        (TokenDataset.from_tokens(torch.arange(20), 4), "ids up to 19, but the model's vocab_size is 9"),
        (CustomDataset((IDS, IDS), length=2.0), "no length.*non-negative integer"),
        (CustomDataset((IDS, IDS), length=-1), "no length.*non-negative integer"),
        (CustomDataset((IDS, IDS), length=None), "no length.*non-negative integer"),
        (CustomDataset((IDS, IDS), length=2**64), "no length.*non-negative integer"),
        (Unreadable((IDS, IDS), length=7), r"train_dataset\[1\] cannot be read.*IndexError.*length, 7"),
        (torch.utils.data.ConcatDataset([[(IDS, IDS)], [(IDS, IDS[1:])]]), r"train_dataset\[1\].*equal length"),
        (torch.utils.data.DataLoader(CustomDataset((IDS, IDS))), "DataLoader.*map-style"),
        ({"train": CustomDataset((IDS, IDS))}, r"the keys 'train'.*Choose one"),
        ("book.txt", r"train_dataset is .*'book.txt'.*from_text.*from_file"),
        (Path("book.txt"), "'book.txt'.*from_file"),
        (b"It is the east.", "It is the east.*from_text"),
        (["It is the east.", "Why?"], r"train_dataset\[0\] is .*'It is the east\.'.*from_text"),
        ([Path("book.txt")], "'book.txt'.*from_file"),
        (attributes(vocab_size=None), "vocab_size is None"),
        (attributes(vocab_size=lambda: 9), "vocab_size is <function"),
        (attributes(bytes_per_token=0), "bytes_per_token is 0"),
        (attributes(bytes_per_token=float("nan")), "bytes_per_token is nan"),
    ],
)
def test_invalid_datasets_raise(dataset, message):
    with pytest.raises(DataError, match=message) as raised:
        check_dataset(dataset, "train_dataset", block_size=8, vocab_size=9)
    assert "train_dataset" in str(raised.value)
