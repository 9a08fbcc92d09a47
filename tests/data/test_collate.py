import pytest
import torch

from homebrew.data.collate import Collate
from homebrew.errors import DataError


def sample(length):
    ids = torch.arange(1, length + 1)
    return ids, ids + 1


@pytest.mark.parametrize(
    ("lengths", "allowed", "length"),
    [
        ([3, 3], (), 3),
        ([3, 5, 1], (), 5),
        ([3, 5, 1], (4, 8), 8),
        ([3, 4], (4, 8), 4),
        ([2], (4, 8), 4),
        ([8, 1], (8, 8), 8),
    ],
)
def test_samples_are_padded_on_the_right(lengths, allowed, length):
    input_ids, targets = Collate(10, 8, allowed)([sample(n) for n in lengths])
    for n, ids, row in zip(lengths, input_ids.tolist(), targets.tolist(), strict=True):
        assert ids == [*range(1, n + 1)] + [0] * (length - n)
        assert row == [*range(2, n + 2)] + [-100] * (length - n)
    assert input_ids.is_contiguous()
    assert targets.is_contiguous()


@pytest.mark.parametrize(("length", "message"), [(9, "9 tokens.*block_size is 8"), (8, "targets from 2 to 9.*0 to 8")])
def test_a_sample_that_the_model_cannot_read_raises(length, message):
    with pytest.raises(DataError, match=message):
        Collate(9, 8)([sample(3), sample(length)])
