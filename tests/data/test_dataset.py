import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from homebrew.data.dataset import TokenDataset
from homebrew.data.preparation.prepare import prepare
from homebrew.data.token_file import write_tokens
from homebrew.data.tokenizer import get_tokenizer
from homebrew.errors import DataError


def counting(num_tokens=100, block_size=8, **options):
    return TokenDataset.from_tokens(torch.arange(num_tokens), block_size, **options)


def shards(folder, sizes, vocab_size=1000, first=0, **options):
    """Token files that together hold consecutive ids from `first`."""
    for i, size in enumerate(sizes):
        write_tokens(folder / f"{i}.npy", np.arange(first, first + size), vocab_size=vocab_size, **options)
        first += size
    return [folder / f"{i}.npy" for i in range(len(sizes))]


def inputs(dataset):
    """The first id of each window. For consecutive ids this is the window's position."""
    return [int(dataset[i][0][0]) for i in range(len(dataset))]


def in_memory(tmp_path, ids, block_size, **options):
    return TokenDataset.from_tokens(ids, block_size, vocab_size=1000, **options)


def in_file(tmp_path, ids, block_size, **options):
    write_tokens(tmp_path / "ids.npy", ids, vocab_size=1000)
    return TokenDataset.from_shards(tmp_path / "ids.npy", block_size, **options)


@pytest.mark.parametrize("make", [in_memory, in_file])
def test_windows_are_consecutive_and_targets_are_shifted_inputs(tmp_path, make):
    dataset = make(tmp_path, np.arange(100), 8)
    assert inputs(dataset) == list(range(0, 92, 8))
    assert dataset.num_tokens == 96
    input_ids, targets = dataset.batch(torch.tensor([3, 0]))
    assert input_ids.dtype == targets.dtype == torch.int64
    assert input_ids.tolist() == [list(range(24, 32)), list(range(8))]
    assert torch.equal(targets, input_ids + 1)
    assert torch.equal(dataset[3][1], targets[0])


@pytest.mark.parametrize("make", [in_memory, in_file])
@pytest.mark.parametrize("part", [slice(3), slice(-2, None), slice(1, 9, 3), slice(None, None, -1), slice(5, 5)])
def test_a_slice_is_a_dataset_of_the_same_kind(tmp_path, make, part):
    dataset = make(tmp_path, np.arange(100), 8)
    assert inputs(dataset[part]) == inputs(dataset)[part]
    assert type(dataset[part]) is TokenDataset
    assert dataset[part].vocab_size == dataset.vocab_size
    assert dataset[:].fingerprint == dataset.fingerprint


@pytest.mark.parametrize("index", [1.0, "0", None, [0, 1], torch.tensor([0, 1]), np.array([0, 1]), (0, 1)])
def test_an_index_that_is_no_integer_is_an_error(index):
    with pytest.raises(DataError, match=r"torch\.utils\.data\.Subset"):
        counting()[index]


def test_an_index_may_be_of_any_integer_type_and_negative():
    dataset = counting()
    for index in (2, np.int64(2), torch.tensor(2), 2 - len(dataset)):
        assert dataset[index][0][0] == 16
    assert len(list(dataset)) == len(dataset)
    with pytest.raises(IndexError):
        dataset[len(dataset)]


@pytest.mark.parametrize("make", [in_memory, in_file])
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


def test_a_dataset_may_have_one_window():
    assert len(counting(9, 8)) == 1


@pytest.mark.parametrize("make", [in_memory, in_file])
@pytest.mark.parametrize("seed", [0, 42, None])
def test_a_split_distributes_all_windows(tmp_path, make, seed):
    dataset = make(tmp_path, np.arange(400), 8)
    first, second = dataset.split(0.8, seed=seed)
    assert len(first) == int(0.8 * len(dataset))
    assert sorted(inputs(first) + inputs(second)) == inputs(dataset)
    assert first.tokens is dataset.tokens, "the tokens are shared"
    repeated, _ = dataset.split(0.8, seed=seed)
    assert inputs(repeated) == inputs(first)


def test_a_split_is_shuffled_only_with_a_seed():
    first, second = counting(400).split(0.5, seed=None)
    assert max(inputs(first)) < min(inputs(second))
    parts = [inputs(counting(400).split(0.5, seed=seed)[0]) for seed in (1, 2)]
    assert parts[0] != parts[1]
    assert max(parts[0]) > min(inputs(second))


def test_a_split_of_overlapping_windows_shares_no_targets():
    overlapping = counting(200, 8, stride=3)
    with pytest.raises(DataError, match="seed=None"):
        overlapping.split(0.5)
    first, second = overlapping.split(0.5, seed=None)
    first_targets = {int(i) for n in range(len(first)) for i in first[n][1]}
    second_targets = {int(i) for n in range(len(second)) for i in second[n][1]}
    assert first_targets
    assert not first_targets & second_targets


def test_a_split_can_be_split_again():
    train, _ = counting(800).split(0.8, seed=1)
    first, second = train.split(0.75, seed=None)
    assert sorted(inputs(first) + inputs(second)) == sorted(inputs(train))
    assert max(inputs(first)) < min(inputs(second))


@pytest.mark.parametrize("text", ["story.txt", ["story.txt"]])
def test_a_path_that_is_taken_for_a_text_is_an_error(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    assert len(TokenDataset.from_text(text, block_size=2, tokenizer="char")) == 4
    (tmp_path / "story.txt").write_text("It was a dark night.")
    with pytest.raises(DataError, match="from_file"):
        TokenDataset.from_text(text, block_size=2, tokenizer="char")
    TokenDataset.from_text("story.txt\0", block_size=2, tokenizer="char")


@pytest.mark.parametrize("tokenizer", ["char", "gpt2"])
def test_another_tokenizer_than_that_of_a_token_file_is_an_error(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("some text")
    prepare(tmp_path / "a.txt", tmp_path / "a.npy", tokenizer="bytes")
    with pytest.raises(DataError, match=f"has the tokenizer 'bytes', but '{tokenizer}' was given"):
        TokenDataset.from_file(tmp_path / "a.npy", 4, tokenizer=tokenizer)


@pytest.mark.parametrize("fraction", [0, 1, -0.5, 1.5, 1e-9, float("nan"), float("inf")])
def test_a_split_with_an_empty_part_raises(fraction):
    with pytest.raises(DataError, match="leaves one of the two datasets empty"):
        counting().split(fraction)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fraction": "0.9"}, "fraction='0.9' is not valid. Use a number between 0 and 1."),
        ({"fraction": None}, "fraction=None is not valid"),
        ({"fraction": 0.5, "seed": "a"}, "seed='a' is not valid. Use an integer"),
        ({"fraction": 0.5, "seed": 1.5}, "seed=1.5 is not valid"),
    ],
)
def test_a_split_with_arguments_of_other_types_raises(arguments, message):
    with pytest.raises(DataError, match=message):
        counting().split(**arguments)


def test_an_error_names_the_file_without_enough_text(tmp_path):
    for name, text in (("empty.txt", ""), ("short.txt", "abc")):
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=r"There is no text in the file .*empty\.txt\. Give a text\."):
        TokenDataset.from_file(tmp_path / "empty.txt", 4, tokenizer="bytes")
    with pytest.raises(DataError, match=r"There are 3 tokens in the file .*short\.txt, but one window needs"):
        TokenDataset.from_file(tmp_path / "short.txt", 4, tokenizer="bytes")
    with pytest.raises(DataError, match="There are 3 tokens in column 'text' of a list with 1 rows, but"):
        TokenDataset.from_dataset([{"text": "abc"}], 4, tokenizer="bytes")


def test_a_split_of_overlapping_windows_with_an_empty_part_raises():
    with pytest.raises(DataError, match="leaves one of the two datasets empty"):
        TokenDataset.from_tokens(range(30), 10, stride=1).split(0.2, seed=None)


def test_a_split_rounds_to_the_nearest_number_of_windows():
    first, _ = TokenDataset.from_tokens(range(401), 4).split(0.58)
    assert len(first) == 58  # 100 * 0.58 is 57.99999999999999


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "There are 0 tokens"),
        ([1, 2], "There are 2 tokens in the data, but one window needs block_size . 1 = 5"),
        (torch.rand(20), "are float32"),
        (torch.ones(20, dtype=torch.bool), "are bool"),
        (torch.zeros(4, 5, dtype=torch.int64), r"are int64 of shape \(4, 5\)"),
        (["to", "be"], r"from_text\(.*from_file\("),
        ("to be", r"from_text\(.*from_file\("),
        ({"input_ids": [1, 2], "attention_mask": [1, 1]}, "input_ids"),
        ([[1, 2], [3]], "must be a one-dimensional sequence of integers"),
        ([2**70] * 9, "must be a one-dimensional sequence of integers"),
        ([1, 2, 3, 4, 99], "Token id 99 is outside the vocabulary of 50"),
        ([1, 2, 3, 4, -1], "Token id -1 is outside the vocabulary of 50"),
        (np.full(9, 2**63, np.uint64), f"Token id {2**63} is outside"),
    ],
)
def test_invalid_ids_raise(ids, message):
    with pytest.raises(DataError, match=message):
        TokenDataset.from_tokens(ids, 4, vocab_size=50)


@pytest.mark.parametrize(
    "ids", [np.arange(9, dtype=np.uint16), np.frombuffer(bytes(range(9)), np.uint8), list(range(9))]
)
def test_ids_may_have_any_integer_dtype(ids):
    dataset = TokenDataset.from_tokens(ids, 4)
    assert dataset[1][0].tolist() == [4, 5, 6, 7]
    assert dataset.vocab_size == 9


def test_ids_are_copied():
    ids = np.arange(9, dtype=np.int32)
    dataset = TokenDataset.from_tokens(ids, 4)
    ids[:] = 0
    assert dataset[1][0].tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize(
    ("block_size", "stride"),
    [(0, None), (-1, None), (4, 0), (4, 2.0), (4.0, None), ("4", 1), (True, 1), (4, "2"), (None, 2)],
)
def test_invalid_windows_raise(block_size, stride):
    with pytest.raises(DataError, match="integer of at least 1"):
        counting(20, block_size, stride=stride)


class OwnTokenizer:
    """A custom tokenizer of five ids. Its description has a tuple, which JSON does not distinguish from a list."""

    name, vocab_size, end_of_text_id = "own", 5, None

    def encode(self, text):
        return np.array([ord(character) % 5 for character in text])

    def decode(self, ids):
        return " ".join(map(str, ids))

    def decode_bytes(self, ids):
        return self.decode(ids).encode()

    def to_json(self):
        return {"name": self.name, "merges": (1, 2)}


def test_from_file(tmp_path):
    text = "Ŧo be, or not to be: that is the question"
    (tmp_path / "text").write_text(text, encoding="utf-8")
    for tokenizer in ("bytes", "char", "gpt2", get_tokenizer("bytes")):
        dataset = TokenDataset.from_file(tmp_path / "text", 4, tokenizer=tokenizer)
        assert dataset.tokenizer.decode(dataset[0][0].tolist()) == text[: len(dataset.tokenizer.decode(dataset[0][0]))]
        assert dataset.bytes_per_token == pytest.approx(len(text.encode()) / len(dataset.tokens))
        assert str(tmp_path / "text") in dataset.source
    assert TokenDataset.from_file(tmp_path / "text", 4).tokenizer.name == "gpt2"
    with pytest.raises(DataError, match="tokenizer ''"):
        TokenDataset.from_file(tmp_path / "text", 4, tokenizer="")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("abc", "There are 3 tokens"),
        ("abc\ud800 and more", "U.D800"),
        (b"abc and more", "type bytes.*Decode"),
    ],
)
@pytest.mark.parametrize("tokenizer", ["bytes", "char"])
def test_invalid_text_raises(text, message, tokenizer):
    with pytest.raises(DataError, match=message):
        TokenDataset.from_text(text, 8, tokenizer=tokenizer)


def test_invalid_text_files_raise(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "binary", tmp_path / "missing"):
        with pytest.raises(DataError, match="cannot be read"):
            TokenDataset.from_file(path, 4)


@pytest.mark.parametrize("make", [in_memory, in_file])
def test_the_fingerprint_depends_on_the_samples_only(tmp_path, make):
    ids = np.arange(100)
    fingerprint = make(tmp_path, ids, 8).fingerprint
    assert make(tmp_path, ids, 8).fingerprint == fingerprint
    changed = ids.copy()
    changed[50] = 0
    others = [make(tmp_path, changed, 8), make(tmp_path, ids, 4), make(tmp_path, ids, 8, stride=4)]
    others += make(tmp_path, ids, 8).split(0.5)
    assert len({fingerprint, *(other.fingerprint for other in others)}) == 6


@pytest.mark.parametrize("make", [in_memory, in_file])
def test_to_another_device(tmp_path, make):
    dataset = make(tmp_path, np.arange(100), 8)
    moved = dataset.to(torch.device("meta"))
    assert moved.device.type == moved.starts.device.type == "meta"
    assert len(moved) == len(dataset)
    assert dataset.to(torch.device("cpu"))[1][0].tolist() == list(range(8, 16))
    assert moved.nbytes == dataset.nbytes == 100 * 4 + 12 * 8


def test_no_window_spans_two_files(tmp_path):
    paths = shards(tmp_path, [20, 5, 30], num_text_bytes=50, source="counting")
    dataset = TokenDataset.from_shards(paths, 8)
    assert inputs(dataset) == [0, 8, 25, 33, 41], "the second file is shorter than a window"
    input_ids, targets = dataset.batch(torch.arange(len(dataset)))
    assert torch.equal(targets, input_ids + 1)
    assert dataset.bytes_per_token == 150 / 55
    assert dataset.source == f"the token file {paths[0]} and 2 more (from counting)"
    assert dataset.vocab_size == 1000


def test_the_tokenizer_is_built_from_the_metadata(tmp_path):
    tokenizer = get_tokenizer("char", text="to be")
    write_tokens(
        tmp_path / "a.npy", tokenizer.encode("to be or"[:5] * 4), vocab_size=5, tokenizer_json=tokenizer.to_json()
    )
    assert TokenDataset.from_shards(tmp_path / "a.npy", 5).tokenizer.alphabet == tokenizer.alphabet
    assert TokenDataset.from_shards(tmp_path / "a.npy", 5, tokenizer="char").tokenizer.alphabet == tokenizer.alphabet
    own = OwnTokenizer()
    write_tokens(tmp_path / "b.npy", np.arange(5), vocab_size=5, tokenizer_json=own.to_json())
    with pytest.raises(DataError, match=r"b\.npy .*custom tokenizer 'own'.* TokenDataset\.from_shards"):
        TokenDataset.from_shards(tmp_path / "b.npy", 4)
    assert TokenDataset.from_shards(tmp_path / "b.npy", 4, tokenizer=own).tokenizer is own


@pytest.mark.parametrize("tokenizer", ["bytes", "gpt2", get_tokenizer("char", text="or no"), OwnTokenizer()])
@pytest.mark.parametrize("open_file", [TokenDataset.from_file, TokenDataset.from_shards])
def test_another_tokenizer_than_that_of_the_token_files_raises(tmp_path, tokenizer, open_file):
    char = get_tokenizer("char", text="to be")
    write_tokens(tmp_path / "a.npy", np.arange(5), vocab_size=5, tokenizer_json=char.to_json())
    with pytest.raises(DataError, match=r"a\.npy has the tokenizer 'char'"):
        open_file(tmp_path / "a.npy", 4, tokenizer=tokenizer)
    write_tokens(tmp_path / "b.npy", np.arange(5), vocab_size=5)
    if (number := getattr(tokenizer, "vocab_size", None)) != 5:
        with pytest.raises(DataError, match=rf"b\.npy has a vocabulary of 5.*{number or tokenizer}"):
            open_file(tmp_path / "b.npy", 4, tokenizer=tokenizer)


def test_from_file_opens_token_files_without_reading_them(tmp_path):
    write_tokens(tmp_path / "a.npy", np.arange(20), vocab_size=50)
    with (tmp_path / "a.npy").open("r+b") as file:
        file.seek(-2, 2)
        file.write(b"\x01\x00")
    assert TokenDataset.from_file(tmp_path, 4).vocab_size == 50
    with pytest.raises(DataError, match="SHA-256"):
        TokenDataset.from_shards(tmp_path, 4)


def test_incompatible_token_files_raise(tmp_path):
    write_tokens(tmp_path / "a.npy", np.arange(20), vocab_size=50)
    write_tokens(tmp_path / "b.npy", np.arange(20), vocab_size=60)
    write_tokens(tmp_path / "c.npy", np.arange(20), vocab_size=50, tokenizer_json={"name": "bytes"})
    for other, message in (("b.npy", "vocab_size=60"), ("c.npy", "tokenizer=.'name': 'bytes'")):
        with pytest.raises(DataError, match=message):
            TokenDataset.from_shards([tmp_path / "a.npy", tmp_path / other], 4)
    with pytest.raises(DataError, match=r"There are 20 tokens in the token file .*a\.npy, but"):
        TokenDataset.from_shards([tmp_path / "a.npy"], 20)
    with pytest.raises(DataError, match="list of token files is empty"):
        TokenDataset.from_shards([], 20)


def test_a_corrupt_file_raises_at_once_and_unchecked_when_the_id_is_read(tmp_path):
    write_tokens(tmp_path / "a.npy", np.arange(20), vocab_size=50)
    with (tmp_path / "a.npy").open("r+b") as file:
        file.seek(-2, 2)
        file.write(b"\xff\xff")
    with pytest.raises(DataError, match="corrupt: its SHA-256"):
        TokenDataset.from_shards(tmp_path / "a.npy", 4)
    unchecked = TokenDataset.from_shards(tmp_path / "a.npy", 4, check=False, stride=1)
    assert unchecked[14][1].tolist() == [15, 16, 17, 18]
    with pytest.raises(DataError, match="token id 65535"):
        unchecked[15]


def test_repr_describes_the_windows_and_their_origin(tmp_path):
    (tmp_path / "a.txt").write_text("To be, or not to be." * 10)
    dataset = TokenDataset.from_file(tmp_path / "a.txt", 8, tokenizer="bytes")
    description = repr(dataset.split(0.5)[0])
    for expected in ("TokenDataset(12 windows", "block_size=8", "vocab_size=256", "tokenizer='bytes'", "a.txt"):
        assert expected in description
    assert "tokenizer=None" in repr(TokenDataset.from_tokens(range(100), 8))


def test_a_split_keeps_the_attributes_of_a_subclass():
    class Masked(TokenDataset):
        probability = 0.1

    dataset = Masked.from_tokens(range(100), 4)
    dataset.probability = 0.5
    first, second = dataset.split(0.5)
    assert type(first) is type(second) is Masked
    assert first.probability == second.probability == 0.5
    assert len({dataset.fingerprint, first.fingerprint, second.fingerprint}) == 3


@pytest.mark.parametrize("value", [5.5, True, "5", 0, 2**32])
def test_an_invalid_vocab_size_raises(value):
    with pytest.raises(DataError, match="vocab_size="):
        counting(4, 2, vocab_size=value)


@pytest.mark.parametrize("block_size", [10**30, 2**63])
def test_sizes_beyond_int64_raise(block_size):
    for options in ({"block_size": block_size}, {"stride": block_size}):
        with pytest.raises(DataError, match=r"(block_size|stride)="):
            counting(**options)


@pytest.mark.parametrize("text", [5, None, 1.5, ["a", None], iter([5])])
def test_a_text_that_is_no_string_raises(text):
    with pytest.raises(DataError, match="must be a string"):
        TokenDataset.from_text(text, 2, tokenizer="bytes")


def test_texts_may_be_an_iterator():
    dataset = TokenDataset.from_text(iter(["abc", "def"]), 2, tokenizer="bytes")
    assert dataset.tokens.ids.tolist() == [*b"abcdef"]


TEXTS = ["abc", "", "defg é"]


class Rows(torch.utils.data.Dataset):
    """A map-style dataset without an end for Python's iteration."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return {"content": TEXTS[index % 3]}


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (lambda: datasets.Dataset.from_dict({"text": TEXTS, "label": [0, 1, 2]}), {}),
        (lambda: datasets.Dataset.from_dict({"text": TEXTS}).to_iterable_dataset(num_shards=2), {}),
        (lambda: [{"text": text} for text in TEXTS], {}),
        (lambda: ({"text": text} for text in TEXTS), {}),
        (Rows, {"text_column": "content"}),
    ],
)
@pytest.mark.parametrize("tokenizer", ["gpt2", "char"])
def test_the_texts_of_a_dataset_are_tokenized_as_several_texts(make, options, tokenizer):
    expected = TokenDataset.from_text(TEXTS, 2, tokenizer=tokenizer)
    actual = TokenDataset.from_dataset(make(), 2, tokenizer=tokenizer, **options)
    assert actual.fingerprint == expected.fingerprint
    assert actual.bytes_per_token == expected.bytes_per_token
    assert "column" in actual.source


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ([{"text": "abc"}, {"text": None}], "Row 1 .*'text': None"),
        ([{"content": "abc"}], "Row 0 .*'content'.*text_column"),
        (["abc"], "Row 0 .*'abc'"),
        ("book.txt", "Row 0"),
        ({"train": [{"text": "abc"}]}, "keys 'train'.*Choose one"),
        (7, "int.*map-style"),
        ([], "no text in column 'text' of a list with 0 rows"),
    ],
)
def test_a_dataset_without_texts_raises(dataset, message):
    with pytest.raises(DataError, match=message):
        TokenDataset.from_dataset(dataset, 2)
