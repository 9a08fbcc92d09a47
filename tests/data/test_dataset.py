import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from homebrew.data.dataset import TokenDataset
from homebrew.data.token_file import write_tokens
from homebrew.data.tokenizer import get_tokenizer
from homebrew.errors import DataError


def counting(num_tokens=100, block_size=8, **options):
    return TokenDataset.from_tokens(torch.arange(num_tokens), block_size, **options)


def shards(folder, sizes, vocab_size=1000, first=0, **options):
    """Files that together count on from `first`."""
    for i, size in enumerate(sizes):
        write_tokens(folder / f"{i}.tokens", np.arange(first, first + size), vocab_size=vocab_size, **options)
        first += size
    return [folder / f"{i}.tokens" for i in range(len(sizes))]


def inputs(dataset):
    """The first id of each window: where it starts, when ids count."""
    return [int(dataset[i][0][0]) for i in range(len(dataset))]


def as_memory(tmp_path, ids, block_size, **options):
    return TokenDataset.from_tokens(ids, block_size, vocab_size=1000, **options)


def as_file(tmp_path, ids, block_size, **options):
    write_tokens(tmp_path / "made.tokens", ids, vocab_size=1000)
    return TokenDataset.from_shards(tmp_path / "made.tokens", block_size, **options)


@pytest.mark.parametrize("make", [as_memory, as_file])
def test_windows_follow_one_another_and_targets_follow_inputs(tmp_path, make):
    dataset = make(tmp_path, np.arange(100), 8)
    assert inputs(dataset) == list(range(0, 92, 8))
    assert dataset.num_tokens == 96
    input_ids, targets = dataset.batch(torch.tensor([3, 0]))
    assert input_ids.dtype == targets.dtype == torch.int64
    assert input_ids.tolist() == [list(range(24, 32)), list(range(8))]
    assert torch.equal(targets, input_ids + 1)
    assert torch.equal(dataset[3][1], targets[0])


@pytest.mark.parametrize("make", [as_memory, as_file])
@pytest.mark.parametrize("stride", [1, 3, 20])
def test_stride(tmp_path, make, stride):
    assert inputs(make(tmp_path, np.arange(30), 8, stride=stride)) == list(range(0, 22, stride))


@given(num_tokens=st.integers(3, 60), block_size=st.integers(1, 20))
def test_without_a_stride_each_token_is_a_target_at_most_once(num_tokens, block_size):
    if num_tokens <= block_size:
        return
    dataset = counting(num_tokens, block_size)
    targets = torch.cat([dataset[i][1] for i in range(len(dataset))]).tolist()
    assert targets == list(range(1, len(targets) + 1))
    assert num_tokens - 1 - len(targets) < block_size


def test_exactly_one_window_is_enough():
    assert len(counting(9, 8)) == 1


@pytest.mark.parametrize("make", [as_memory, as_file])
@pytest.mark.parametrize("seed", [0, 42, None])
def test_a_split_shares_out_all_windows(tmp_path, make, seed):
    whole = make(tmp_path, np.arange(400), 8)
    first, second = whole.split(0.8, seed=seed)
    assert len(first) == int(0.8 * len(whole))
    assert sorted(inputs(first) + inputs(second)) == inputs(whole)
    assert first.tokens is whole.tokens, "the tokens are shared"
    again, _ = whole.split(0.8, seed=seed)
    assert inputs(again) == inputs(first)


def test_a_split_by_seed_is_shuffled_and_one_without_is_not():
    first, second = counting(400).split(0.5, seed=None)
    assert max(inputs(first)) < min(inputs(second))
    parts = [inputs(counting(400).split(0.5, seed=seed)[0]) for seed in (1, 2)]
    assert parts[0] != parts[1]
    assert max(parts[0]) > min(inputs(second))


def test_overlapping_windows_are_cut_without_a_leak_or_not_at_all():
    overlapping = counting(200, 8, stride=3)
    with pytest.raises(DataError, match="seed=None"):
        overlapping.split(0.5)
    first, second = overlapping.split(0.5, seed=None)
    seen = {int(i) for n in range(len(first)) for i in first[n][1]}
    asked = {int(i) for n in range(len(second)) for i in second[n][1]}
    assert seen
    assert not seen & asked


def test_a_part_of_a_shuffled_split_can_be_cut_again():
    train, _ = counting(800).split(0.8, seed=1)
    first, second = train.split(0.75, seed=None)
    assert sorted(inputs(first) + inputs(second)) == sorted(inputs(train))
    assert max(inputs(first)) < min(inputs(second))


@pytest.mark.parametrize("fraction", [0, 1, -0.5, 1.5, 1e-9, float("nan"), float("inf")])
def test_a_split_with_an_empty_part_is_refused(fraction):
    with pytest.raises(DataError, match="leaves a part without any"):
        counting().split(fraction)


def test_a_split_whose_overlapping_windows_leave_a_part_empty_is_refused():
    with pytest.raises(DataError, match="leaves a part without any"):
        TokenDataset.from_tokens(range(30), 10, stride=1).split(0.2, seed=None)


def test_a_split_has_the_nearest_number_of_windows():
    first, _ = TokenDataset.from_tokens(range(401), 4).split(0.58)
    assert len(first) == 58  # though 100 * 0.58 is 57.99999999999999


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ([], "There are 0 tokens"),
        ([1, 2], "There are 2 tokens, but one window takes block_size . 1 = 5"),
        (torch.rand(20), "must be integers in one row; got float32"),
        (torch.ones(20, dtype=torch.bool), "must be integers in one row; got bool"),
        (torch.zeros(4, 5, dtype=torch.int64), r"got int64 of shape \(4, 5\)"),
        (["to", "be"], "must be integers in one row"),
        ([[1, 2], [3]], "must be integers in one row"),
        ([2**70] * 9, "must be integers in one row"),
        ([1, 2, 3, 4, 99], "Token id 99 is outside the vocabulary of 50"),
        ([1, 2, 3, 4, -1], "Token id -1 is outside the vocabulary of 50"),
        (np.full(9, 2**63, np.uint64), f"Token id {2**63} is outside"),
    ],
)
def test_wrong_ids_are_refused(ids, said):
    with pytest.raises(DataError, match=said):
        TokenDataset.from_tokens(ids, 4, vocab_size=50)


@pytest.mark.parametrize(
    "ids", [np.arange(9, dtype=np.uint16), np.frombuffer(bytes(range(9)), np.uint8), list(range(9))]
)
def test_ids_may_be_of_any_integer_type(ids):
    dataset = TokenDataset.from_tokens(ids, 4)
    assert dataset[1][0].tolist() == [4, 5, 6, 7]
    assert dataset.vocab_size == 9


def test_the_tokens_are_a_copy():
    ids = np.arange(9, dtype=np.int32)
    dataset = TokenDataset.from_tokens(ids, 4)
    ids[:] = 0
    assert dataset[1][0].tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize(("block_size", "stride"), [(0, None), (-1, None), (4, 0)])
def test_wrong_windows_are_refused(block_size, stride):
    with pytest.raises(DataError, match="must be at least 1"):
        counting(20, block_size, stride=stride)


def test_text_and_file(tmp_path):
    text = "Ŧo be, or not to be: that is the question"
    (tmp_path / "text").write_text(text, encoding="utf-8")
    for tokenizer in ("bytes", "char", "gpt2", get_tokenizer("bytes")):
        dataset = TokenDataset.from_file(tmp_path / "text", 4, tokenizer=tokenizer)
        assert dataset.tokenizer.decode(dataset[0][0].tolist()) == text[: len(dataset.tokenizer.decode(dataset[0][0]))]
        assert dataset.bytes_per_token == pytest.approx(len(text.encode()) / len(dataset.tokens))
        assert str(tmp_path / "text") in dataset.source


@pytest.mark.parametrize(
    ("text", "said"), [("", "empty"), ("abc", "There are 3 tokens"), ("abc\ud800 and more", "U.D800")]
)
@pytest.mark.parametrize("tokenizer", ["bytes", "char"])
def test_wrong_text_is_refused(text, said, tokenizer):
    with pytest.raises(DataError, match=said):
        TokenDataset.from_text(text, 8, tokenizer=tokenizer)


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "binary", tmp_path, tmp_path / "none"):
        with pytest.raises(DataError, match="cannot be read"):
            TokenDataset.from_file(path, 4)


@pytest.mark.parametrize("make", [as_memory, as_file])
def test_a_fingerprint_is_that_of_the_samples(tmp_path, make):
    ids = np.arange(100)
    print_of = make(tmp_path, ids, 8).fingerprint
    assert make(tmp_path, ids, 8).fingerprint == print_of
    changed = ids.copy()
    changed[50] = 0
    others = [make(tmp_path, changed, 8), make(tmp_path, ids, 4), make(tmp_path, ids, 8, stride=4)]
    others += make(tmp_path, ids, 8).split(0.5)
    assert len({print_of, *(other.fingerprint for other in others)}) == 6


@pytest.mark.parametrize("make", [as_memory, as_file])
def test_another_device(tmp_path, make):
    dataset = make(tmp_path, np.arange(100), 8)
    moved = dataset.to(torch.device("meta"))
    assert moved.device.type == moved.starts.device.type == "meta"
    assert moved.fingerprint if moved is dataset else len(moved) == len(dataset)
    assert dataset.to(torch.device("cpu"))[1][0].tolist() == list(range(8, 16))
    assert moved.nbytes == dataset.nbytes == 100 * 4 + 12 * 8


def test_windows_of_several_files_stay_within_one(tmp_path):
    paths = shards(tmp_path, [20, 5, 30], num_text_bytes=50, source="counting")
    dataset = TokenDataset.from_shards(paths, 8)
    assert inputs(dataset) == [0, 8, 25, 33, 41], "5 tokens are too few for a window"
    everything = torch.arange(len(dataset))
    input_ids, targets = dataset.batch(everything)
    assert torch.equal(targets, input_ids + 1)
    assert dataset.bytes_per_token == 150 / 55
    assert dataset.source == f"the token file {paths[0]} and 2 more (from counting)"
    assert dataset.vocab_size == 1000


def test_files_bring_their_tokenizer(tmp_path):
    mine = get_tokenizer("char", text="to be")
    write_tokens(tmp_path / "a", mine.encode("to be or"[:5] * 4), vocab_size=5, tokenizer_json=mine.to_json())
    assert TokenDataset.from_shards(tmp_path / "a", 5).tokenizer.alphabet == mine.alphabet
    write_tokens(tmp_path / "b", np.arange(5), vocab_size=5, tokenizer_json={"name": "own"})
    with pytest.raises(DataError, match="'own'"):
        TokenDataset.from_shards(tmp_path / "b", 4)
    assert TokenDataset.from_shards(tmp_path / "b", 4, tokenizer=mine).tokenizer is mine


def test_files_that_do_not_fit_together_are_refused(tmp_path):
    write_tokens(tmp_path / "a", np.arange(20), vocab_size=50)
    write_tokens(tmp_path / "b", np.arange(20), vocab_size=60)
    write_tokens(tmp_path / "c", np.arange(20), vocab_size=50, tokenizer_json={"name": "bytes"})
    for other, said in (("b", "vocab_size=60"), ("c", "tokenizer=.'name': 'bytes'")):
        with pytest.raises(DataError, match=said):
            TokenDataset.from_shards([tmp_path / "a", tmp_path / other], 4)
    with pytest.raises(DataError, match="There are 20 tokens"):
        TokenDataset.from_shards([tmp_path / "a"], 20)
    with pytest.raises(DataError, match="no token files"):
        TokenDataset.from_shards([], 20)


def test_a_damaged_file_is_found_at_once_and_a_wrong_id_when_it_is_read(tmp_path):
    write_tokens(tmp_path / "a", np.arange(20), vocab_size=50)
    with (tmp_path / "a").open("r+b") as file:
        file.seek(-2, 2)
        file.write(b"\xff\xff")
    with pytest.raises(DataError, match="token id 65535"):
        TokenDataset.from_shards(tmp_path / "a", 4)
    unchecked = TokenDataset.from_shards(tmp_path / "a", 4, check=False, stride=1)
    assert unchecked[14][1].tolist() == [15, 16, 17, 18]
    with pytest.raises(DataError, match="token id 65535"):
        unchecked[15]
