from collections import UserDict
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset

from homebrew.data.dict_dataset import DictDataset
from homebrew.data.samples import as_sample
from homebrew.errors import DataError

IDS = [5, 6, 7, 8]
SHIFTED = [6, 7, 8, -100]
TARGETS = [6, 7, 8, 9]


class Pair(NamedTuple):
    x: object
    y: object


DTYPES = [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("convert", [torch.tensor, np.array])
def test_ids_may_have_any_integer_dtype(convert, dtype):
    ids, targets = (convert(x, dtype=getattr(torch if convert is torch.tensor else np, dtype)) for x in (IDS, TARGETS))
    for sample in ((ids, targets), {"input_ids": ids, "targets": targets}):
        input_ids, shifted = as_sample(sample, "sample")
        assert input_ids.dtype == shifted.dtype == torch.int64
        assert (input_ids.tolist(), shifted.tolist()) == (IDS, TARGETS)


def read_only(ids):
    array = np.array(ids)
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    "sample",
    [
        (IDS, TARGETS),
        [IDS, TARGETS],
        Pair(tuple(IDS), range(6, 10)),
        (torch.tensor(IDS), np.array(TARGETS)),
        (read_only(IDS), np.array([TARGETS, TARGETS]).T[:, 0]),
        np.array([IDS, TARGETS], dtype=np.uint16),
        torch.tensor([IDS, TARGETS], dtype=torch.int32),
        (list(map(np.int32, IDS)), list(map(torch.tensor, TARGETS))),
        UserDict(input_ids=IDS, targets=TARGETS),
        {"input_ids": IDS, "targets": np.array(TARGETS), "text": "four tokens here", "tokens": list("abcd"), "n": 4},
        {"input_ids": IDS, "targets": TARGETS, "token_type_ids": [0] * 4, "special_tokens_mask": [0] * 4},
    ],
)
def test_pairs_and_dictionaries_of_any_sequences(sample):
    input_ids, targets = as_sample(sample, "sample")
    assert (input_ids.tolist(), targets.tolist()) == (IDS, TARGETS)
    assert input_ids.dtype == targets.dtype == torch.int64


@pytest.mark.parametrize(
    "sample", [IDS, tuple(IDS), np.array(IDS, dtype=np.uint16), torch.tensor(IDS), {"input_ids": IDS}]
)
def test_each_token_of_token_ids_is_the_target_of_the_one_before(sample):
    input_ids, targets = as_sample(sample, "sample")
    assert (input_ids.tolist(), targets.tolist()) == (IDS, SHIFTED)


@pytest.mark.parametrize("sample", [[5, 6], (np.int64(5), np.int64(6)), torch.tensor([5, 6])])
def test_two_token_ids_are_not_a_pair(sample):
    assert [ids.tolist() for ids in as_sample(sample, "sample")] == [[5, 6], [6, -100]]


def test_a_sample_of_one_token_has_no_target():
    assert [ids.tolist() for ids in as_sample([5], "sample")] == [[5], [-100]]


@pytest.mark.parametrize("mask", [[0, 1, 1, 0], [False, True, True, False], [0.0, 1.0, 1.0, 0.0]])
@pytest.mark.parametrize("convert", [list, np.array, torch.tensor])
def test_a_loss_mask_has_the_alignment_of_what_it_masks(mask, convert):
    mask = {"loss_mask": convert(mask)}
    assert as_sample({"input_ids": IDS, "targets": TARGETS} | mask, "sample")[1].tolist() == [-100, 7, 8, -100]
    assert as_sample({"input_ids": IDS} | mask, "sample")[1].tolist() == [6, 7, -100, -100]
    rows = [{"input_ids": IDS, "labels": [1, 2, 3, 4]} | mask]
    assert DictDataset(rows, labels_are_shifted=True)[0][1].tolist() == [-100, 2, 3, -100]
    assert DictDataset(rows, labels_are_shifted=False)[0][1].tolist() == [2, 3, -100, -100]


def test_labels_equal_the_loss_of_transformers():
    """Their model shifts labels itself: `logits[:-1]` against `labels[1:]`."""
    labels = [-100, 6, -100, 8]
    input_ids, targets = DictDataset([{"input_ids": IDS, "labels": labels}], labels_are_shifted=False)[0]
    logits = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(labels[1:]))
    assert torch.equal(torch.nn.functional.cross_entropy(logits, targets), expected)
    assert input_ids.tolist() == IDS


def test_padding_that_the_attention_mask_marks_has_no_targets_and_may_have_any_id():
    mask = {"attention_mask": [1, 1, 1, 0]}
    padded = [5, 6, 7, 50257]
    for sample, expected in (
        ({"input_ids": padded}, [6, 7, -100, -100]),
        ({"input_ids": padded, "targets": [6, 7, 9, 50257]}, [6, 7, 9, -100]),
    ):
        input_ids, targets = as_sample(sample | mask, "sample")
        assert (input_ids.tolist(), targets.tolist()) == ([5, 6, 7, 0], expected)
    rows = [{"input_ids": padded, "labels": padded} | mask]
    assert DictDataset(rows, labels_are_shifted=False)[0][1].tolist() == [6, 7, -100, -100]
    assert as_sample({"input_ids": IDS, "attention_mask": [1, 1, 1, 1]}, "sample")[1].tolist() == SHIFTED


@pytest.mark.parametrize(
    "mask", [[0, 0, 1, 1], [1, 0, 1, 1], [0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 2, 2], np.tri(4), [[1] * 4], [0.5] * 4]
)
def test_an_attention_mask_that_is_not_causal_raises(mask):
    with pytest.raises(DataError, match=r"(?s)train\[3\]\['attention_mask'\].*(padding on the right|of 0 and 1)"):
        as_sample({"input_ids": IDS, "attention_mask": mask}, "train[3]")


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (None, "None, but must be"),
        ("some text", "'some text', but must be.*from_text"),
        (np.str_("some text"), "'some text', but must be.*from_text"),
        (["some", "more", "words"], "from_text"),
        (7, "7, but must be"),
        ([1.0, 2], r"\[1.0, 2\], but must be"),
        ((), "must be|no tokens"),
        (("a", "b"), "'a', but must be.*from_text"),
        ((IDS,), "must be"),
        ((IDS, TARGETS, IDS), "must be"),
        (torch.tensor(5), "must be"),
        (torch.zeros(3, 4, dtype=torch.int64), "must be"),
        ((torch.tensor([IDS]), torch.tensor([IDS])), "one-dimensional"),
        ((torch.ones(4), IDS), "integers"),
        ((torch.ones(4, requires_grad=True), IDS), "integers"),
        ((torch.ones(4, dtype=torch.bfloat16), IDS), "integers"),
        ((np.array([True, False]), [1, 2]), "integers"),
        (([1, None], [1, 2]), "integers"),
        (([1, [2]], [1, 2]), "integers"),
        ((np.array([2**64 - 100], dtype=np.uint64), [1]), "18446744073709551516.*int64"),
        ((IDS, TARGETS[1:]), "4 input_ids, 3 targets"),
        (([], []), "no tokens"),
        ({"input_ids": []}, "no tokens"),
        ({"tokens": IDS}, "keys .'tokens'., but must have 'input_ids'.*from_dataset"),
        ({"input_ids": IDS, "targets": IDS, "labels": IDS}, "both 'targets' and 'labels'"),
        ({"input_ids": IDS, "labels": IDS}, "may be shifted or not.*DictDataset"),
        ({"input_ids": "text"}, "'input_ids'. is .*'text'.*from_text"),
        ({"input_ids": IDS, "targets": None}, "'targets'. is None"),
        ({"input_ids": IDS, "loss_mask": [1, 1]}, "4 input_ids, 2 loss_mask"),
        ({"input_ids": IDS, "loss_mask": [1, 1, 0.5, 0]}, "'loss_mask'.*0 and 1"),
        ({"input_ids": IDS, "loss_mask": [[1], [1, 1]]}, "'loss_mask'.*0 and 1"),
        ({"input_ids": IDS, "loss_mask": torch.tensor([1, 1, 1, 0]).to_sparse()}, "'loss_mask'.*0 and 1"),
        ({"input_ids": IDS, "loss_mask": list("abcd")}, "'loss_mask'.*0 and 1"),
        ({"input_ids": IDS, "loss_masks": [1, 1, 1, 0]}, "'loss_masks'. has a number for each token"),
        ({"input_ids": IDS, "assistant_masks": [0, 1, 1, 1]}, "'assistant_masks'. has a number.*Rename.*loss_mask"),
        ({"input_ids": IDS, "position_ids": torch.arange(4)}, "'position_ids'. has a number for each token"),
        ({"input_ids": IDS, "weights": np.ones(4)}, "'weights'. has a number for each token"),
    ],
)
def test_an_invalid_sample_raises(sample, message):
    with pytest.raises(DataError, match=f"(?s){message}") as raised:
        as_sample(sample, "train_dataset[3]")
    assert "train_dataset[3]" in str(raised.value)


class Stream(IterableDataset):
    def __iter__(self):
        yield {"input_ids": IDS, "labels": IDS}


@pytest.mark.parametrize(
    ("dataset", "shifted", "message"),
    [
        (Stream(), False, "Stream.*map-style"),
        ({"train": []}, False, "Choose one"),
        ([{"input_ids": IDS, "labels": IDS}], None, "labels_are_shifted is None"),
        ([{"input_ids": IDS, "labels": IDS}], "no", "labels_are_shifted is 'no'"),
    ],
)
def test_an_invalid_dict_dataset_raises(dataset, shifted, message):
    with pytest.raises(DataError, match=message):
        DictDataset(dataset, labels_are_shifted=shifted)
