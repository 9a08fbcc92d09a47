import pytest
import torch
from torch.utils.data import Dataset, IterableDataset

from homebrew.data.dataset import TokenDataset
from homebrew.data.validation import check_dataset
from homebrew.errors import DataError

IDS = torch.arange(8)


class Own(Dataset):
    """A user's dataset of one sample."""

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


class NoLength(Dataset):
    def __getitem__(self, index):
        return IDS, IDS


@pytest.mark.parametrize(
    "dataset",
    [
        TokenDataset.from_tokens(torch.arange(9), 8),
        Own((IDS, IDS)),
        Own([IDS, IDS]),
        Own((IDS, torch.full((8,), -100))),
        torch.utils.data.TensorDataset(IDS[None], IDS[None]),
    ],
)
def test_what_can_be_trained_on_passes(dataset):
    assert check_dataset(dataset, "train_dataset", block_size=8, vocab_size=9) == 8


@pytest.mark.parametrize(
    ("dataset", "said"),
    [
        (Own((IDS, IDS), 0), "is empty"),
        (NoLength(), "NoLength.*map-style"),
        (Endless(), "Endless.*map-style"),
        (Own(IDS), "must be .input_ids, targets."),
        (Own((IDS,)), "must be"),
        (Own({"input_ids": IDS, "targets": IDS}), "must be"),
        (Own((IDS.tolist(), IDS.tolist())), "must be"),
        (Own((IDS.float(), IDS)), "must be"),
        (Own((IDS, IDS.int())), "must be"),
        (Own((IDS, IDS[1:])), "must be"),
        (Own((IDS[None], IDS[None])), "must be"),
        (Own((IDS[:0], IDS[:0])), "must be"),
        (Own((torch.arange(9), torch.arange(9))), "9 tokens, but the model's block_size is 8"),
        (Own((IDS + 2, IDS)), "input_ids from 2 to 9, but the model's vocabulary is 0 to 8"),
        (Own((IDS, IDS - 1)), "targets from -1 to 6"),
        (Own((IDS - 100, IDS)), "input_ids from -100"),
        (TokenDataset.from_tokens(torch.arange(20), 4), "ids up to 19, but the model's vocab_size is 9"),
    ],
)
def test_what_cannot_is_refused(dataset, said):
    with pytest.raises(DataError, match=said) as caught:
        check_dataset(dataset, "train_dataset", block_size=8, vocab_size=9)
    assert "train_dataset" in str(caught.value)
