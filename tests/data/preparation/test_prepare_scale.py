"""`prepare` with several processes, shards, a validation split and special tokens; and after SIGKILL."""

import gzip
import io
import json
import shutil
import signal
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from homebrew import TokenDataset, get_tokenizer
from homebrew.data.gpt2_vocabulary import END_OF_TEXT
from homebrew.data.preparation import encode_part, plan
from homebrew.data.preparation import prepare as prepare_module
from homebrew.data.preparation.prepare import prepare
from homebrew.data.preparation.state import PrepareState
from homebrew.data.token_file import TokenFile
from homebrew.errors import DataError

END = 50_256
WORDS = "to be or not that is the question — 中文 whether nobler mind\n".split(" ")


def make_text(seed, num_words=60):
    generator = np.random.default_rng(seed)
    return " ".join(generator.choice(WORDS, generator.integers(1, num_words)))


@pytest.fixture(scope="module")
def texts():
    return [make_text(seed) for seed in range(120)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, texts):
    """Documents in files of all formats, in the order of `texts`."""
    folder = tmp_path_factory.mktemp("inputs")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts[2:60])
    (folder / "a.txt").write_text(texts[0], newline="")
    (folder / "b.txt.gz").write_bytes(gzip.compress(texts[1].encode()))
    (folder / "c.jsonl").write_text(lines)
    pq.write_table(pa.table({"text": texts[60:]}), folder / "d.parquet", row_group_size=9)
    return folder


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(plan, "PART_BYTES", 1500)


def ids_of(*paths):
    return [i for path in paths for i in np.load(path).tolist()]


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("is_fast", [False, True])
@pytest.mark.usefixtures("small_parts")
def test_the_ids_are_those_of_the_documents_for_any_number_of_workers(inputs, texts, tmp_path, monkeypatch, is_fast):
    monkeypatch.setattr(prepare_module, "_MIN_FAST_BYTES", 0 if is_fast else 2**63)
    tokenizer = get_tokenizer("gpt2")
    expected = [i for text in texts for i in [END, *tokenizer.encode(text).tolist()]][1:]
    for workers in (1, 2, 3):
        sizes = prepare(inputs, tmp_path / str(workers) / "out.npy", workers=workers)
        assert ids_of(tmp_path / str(workers) / "out.npy") == expected
        assert sizes == {"train": (len(texts), len(expected), sum(len(text.encode()) for text in texts))}
        assert files_in(tmp_path / str(workers)) == files_in(tmp_path / "1")


@pytest.mark.parametrize("tokenizer", ["bytes", "char"])
@pytest.mark.usefixtures("small_parts")
def test_tokenizers_without_end_of_text_join_the_documents(inputs, texts, tmp_path, tokenizer):
    for workers in (1, 2):
        prepare(inputs, tmp_path / "out.npy", tokenizer=tokenizer, workers=workers)
        file = TokenFile(tmp_path / "out.npy")
        decoder = get_tokenizer(tokenizer, text="".join(texts))
        assert decoder.decode(file.read(0, len(file)).tolist()) == "".join(texts)


@pytest.mark.usefixtures("small_parts")
def test_shards_have_equal_lengths(inputs, tmp_path):
    prepare(inputs, tmp_path / "one.npy", workers=1)
    size = prepare(inputs, tmp_path / "book.npy", shard_tokens=700, workers=1)["train"]
    shards = sorted(tmp_path.glob("book-*.npy"))
    lengths = [len(np.load(shard)) for shard in shards]
    assert [shard.name for shard in shards[:2]] == ["book-00000.npy", "book-00001.npy"]
    assert set(lengths[:-1]) == {700}
    assert 0 < lengths[-1] <= 700
    assert ids_of(*shards) == ids_of(tmp_path / "one.npy")
    assert (size.num_documents, size.num_tokens) == (120, sum(lengths))
    dataset = TokenDataset.from_file(str(tmp_path / "book-*.npy"), 8)
    assert len(dataset.tokens) == size.num_tokens
    assert dataset.num_text_bytes == size.num_text_bytes == TokenFile(tmp_path / "one.npy").metadata.num_text_bytes


def test_shards_of_an_earlier_run_are_replaced(inputs, tmp_path):
    prepare(inputs, tmp_path / "book.npy", shard_tokens=300, tokenizer="bytes", workers=1)
    prepare(inputs, tmp_path / "book.npy", shard_tokens=9000, tokenizer="bytes", workers=1)
    assert sorted(tmp_path.glob("book-*")) == [
        tmp_path / f"book-{i:05}.{suffix}"
        for i in range(len(list(tmp_path.glob("*.npy"))))
        for suffix in ("json", "npy")
    ]
    assert len(np.load(tmp_path / "book-00000.npy")) == 9000


def test_a_shard_length_that_divides_the_ids(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 100)
    prepare(tmp_path / "a.txt", tmp_path / "out.npy", shard_tokens=50, tokenizer="bytes")
    assert [len(np.load(path)) for path in sorted(tmp_path.glob("*.npy"))] == [50, 50]


@pytest.mark.usefixtures("small_parts")
def test_documents_are_split_by_their_content(inputs, texts, tmp_path):
    for workers in (1, 2):
        sizes = prepare(inputs, tmp_path / str(workers) / "book.npy", val_fraction=0.2, workers=workers)
    assert files_in(tmp_path / "1") == files_in(tmp_path / "2")
    ids = {name: ids_of(tmp_path / "1" / f"book-{name}.npy") for name in ("train", "val")}
    train, val = map(split_at_end, ids.values())
    for name, documents in (("train", train), ("val", val)):
        num_text_bytes = sum(len(text.encode()) for text in documents)
        assert sizes[name] == (len(documents), len(ids[name]), num_text_bytes)
    assert sorted(train + val) == sorted(texts)
    assert 10 < len(val) < 40
    # The same in another order, in one file, in parts of another size.
    (tmp_path / "all.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in reversed(texts)))
    prepare(tmp_path / "all.jsonl", tmp_path / "all.npy", val_fraction=0.2)
    assert split_at_end(ids_of(tmp_path / "all-val.npy")) == val[::-1]
    assert split_at_end(ids_of(tmp_path / "all-train.npy")) == train[::-1]


def split_at_end(ids):
    texts, tokenizer = [[]], get_tokenizer("gpt2")
    for i in ids:
        if i == END:
            texts.append([])
        else:
            texts[-1].append(i)
    return [tokenizer.decode(text) for text in texts]


def test_a_long_text_is_in_one_split(tmp_path, monkeypatch):
    texts = {f"{i}.txt": f"{i}: " + make_text(i, 2000) for i in range(8)}
    for name, text in texts.items():
        (tmp_path / name).write_text(text, newline="")
    results = []
    monkeypatch.setattr(encode_part, "_KEY_CHARACTERS", 100)
    for part_bytes in (500, 10**6):
        monkeypatch.setattr(plan, "PART_BYTES", part_bytes)
        prepare(tmp_path, tmp_path / "out.npy", val_fraction=0.5, workers=1)
        results.append([split_at_end(ids_of(tmp_path / f"out-{name}.npy")) for name in ("train", "val")])
    assert results[0] == results[1]
    assert sorted(results[0][0] + results[0][1]) == sorted(texts.values())


def test_the_end_of_text_marker_is_text_unless_it_is_allowed(tmp_path):
    text = f"To be,{END_OF_TEXT}or not{END_OF_TEXT}"
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": text}))
    tokenizer = get_tokenizer("gpt2")
    prepare(tmp_path, tmp_path / "out.npy")
    plain = tokenizer.encode(text).tolist()
    assert ids_of(tmp_path / "out.npy") == [*plain, END, *plain]
    prepare(tmp_path, tmp_path / "out.npy", allow_special=True)
    first, second = (tokenizer.encode(part).tolist() for part in ("To be,", "or not"))
    assert ids_of(tmp_path / "out.npy") == [*first, END, *second, END, END, *first, END, *second, END]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "workers=0"),
        ({"workers": 1.5}, "workers=1.5"),
        ({"shard_tokens": 0}, "shard_tokens=0"),
        ({"val_fraction": 1}, "val_fraction=1"),
        ({"val_fraction": -0.1}, "val_fraction=-0.1"),
        ({"val_fraction": float("nan")}, "val_fraction=nan"),
        ({"val_fraction": "0.1"}, "val_fraction='0.1'"),
        ({"val_fraction": 1e-9}, "of the 2 in .* none with text is for val"),
        ({"val_fraction": 1e-9, "shard_tokens": 2}, "of the 2 in .* none with text is for val"),
        ({"val_fraction": 1 - 1e-9, "shard_tokens": 2}, "none with text is for train"),
        ({"allow_special": True, "tokenizer": "bytes"}, "allow_special.*'bytes' has none"),
    ],
)
def test_invalid_arguments_raise_and_leave_nothing(tmp_path, options, message):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(f"{name}: to be")
    with pytest.raises(DataError, match=message):
        prepare(tmp_path, tmp_path / "out.npy", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b.txt"]


def test_only_empty_documents_raise(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n' * 3)
    with pytest.raises(DataError, match="no text to prepare"):
        prepare(tmp_path, tmp_path / "out.npy")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.usefixtures("small_parts")
def test_an_error_of_a_worker_is_raised_and_the_finished_parts_are_used_again(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "To be, or not to be"}\n' * 200)
    (tmp_path / "b.jsonl").write_text('{"text": 1}')
    for _ in range(2):
        with pytest.raises(DataError, match=r"b\.jsonl', line 1"):
            prepare(tmp_path, tmp_path / "out.npy", tokenizer="bytes", workers=2, shard_tokens=100)
    assert (tmp_path / "out.partial").is_dir()
    shard = (tmp_path / "out-00003.npy").stat()
    (tmp_path / "b.jsonl").write_text('{"text": "that"}')
    prepare(tmp_path, tmp_path / "out.npy", tokenizer="bytes", workers=2, shard_tokens=100)
    assert (tmp_path / "out-00003.npy").stat().st_ino == shard.st_ino
    assert bytes(ids_of(*sorted(tmp_path.glob("*.npy")))) == b"To be, or not to be" * 200 + b"that"
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.usefixtures("small_parts")
def test_a_worker_that_ends_is_an_error(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(DataError, match="ended with exit code 1"):
        prepare(inputs, tmp_path / "out.npy", tokenizer="bytes", workers=2)
    assert list(tmp_path.iterdir()) == []


def test_two_runs_with_one_output_are_an_error(inputs, tmp_path):
    with PrepareState(tmp_path / "out.npy").locked(), pytest.raises(DataError, match="in use by another process"):
        prepare(inputs, tmp_path / "out.npy", tokenizer="bytes")
    assert list(tmp_path.iterdir()) == []


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("stream", "progress"), [(Terminal(), True), (Terminal(), False), (io.StringIO(), True)])
def test_progress_is_shown_on_a_terminal(inputs, tmp_path, monkeypatch, stream, progress):
    monkeypatch.setattr(sys, "stderr", stream)
    prepare(inputs, tmp_path / "out.npy", tokenizer="bytes", progress=progress)
    assert ("Tokenizing" in stream.getvalue()) == (stream.isatty() and progress)


KILLED_AT_SYNC = """
import os, signal, sys
from homebrew.data.preparation import encode_part, plan
from homebrew.data.preparation.prepare import prepare
from homebrew.data.preparation.state import PrepareState
plan.PART_BYTES = 1500
remaining = int(sys.argv[1])
fsync = os.fsync
def kill_or_sync(descriptor):
    global remaining
    remaining -= 1
    if remaining == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(descriptor)
os.fsync = kill_or_sync
options = dict(tokenizer="bytes", val_fraction=0.3, shard_tokens=1000)
prepare(sys.argv[2], sys.argv[3], workers=int(sys.argv[4]), **options)
"""
OPTIONS = {"tokenizer": "bytes", "val_fraction": 0.3, "shard_tokens": 1000}


def run_and_kill(inputs, output, number, workers=1):
    """Prepare in a process that kills itself at its `number`-th sync. Return whether it was killed."""
    arguments = [sys.executable, "-c", KILLED_AT_SYNC, str(number), str(inputs), str(output), str(workers)]
    code = subprocess.run(arguments, check=False).returncode
    assert code in (0, -signal.SIGKILL)
    return code != 0


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("number", [1, 4, 9, *(pytest.param(i, marks=pytest.mark.slow) for i in (15, 40, 65, 90, 105))])
def test_a_killed_run_is_continued(inputs, tmp_path, number):
    prepare(inputs, tmp_path / "expected" / "book.npy", workers=1, **OPTIONS)
    output = tmp_path / "out" / "book.npy"
    assert run_and_kill(inputs, output, number)
    for file in output.parent.glob("*.json"):
        TokenFile(file.with_suffix(".npy")).verify()  # no shard is incomplete
    complete = {file: file.stat().st_ino for file in output.parent.glob("*.json")}
    if run_and_kill(inputs, output, number):
        prepare(inputs, output, workers=2 if number == 9 else 1, **OPTIONS)
    assert files_in(output.parent) == files_in(tmp_path / "expected")
    assert {file: file.stat().st_ino for file in complete} == complete


@pytest.mark.usefixtures("small_parts")
def test_other_options_than_those_of_a_killed_run_are_an_error(inputs, tmp_path):
    output = tmp_path / "book.npy"
    assert run_and_kill(inputs, output, 9)
    before = files_in(tmp_path / "book.partial")
    for option, value in {
        "tokenizer": "gpt2",
        "val_fraction": 0.2,
        "shard_tokens": None,
        "allow_special": True,
    }.items():
        options = OPTIONS | {"tokenizer": "gpt2"} if option == "allow_special" else OPTIONS
        with pytest.raises(
            DataError, match=rf"book\.partial .*{option if option in OPTIONS else 'tokenizer'}=.*delete"
        ):
            prepare(inputs, output, **options | {option: value})
    assert files_in(tmp_path / "book.partial") == before


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize(("changed", "kept"), [("a.txt", "none"), ("d.parquet", "some"), ("e.txt", "all")])
def test_a_killed_run_is_continued_up_to_the_first_input_that_changed(inputs, tmp_path, changed, kept):
    shutil.copytree(inputs, tmp_path / "in")
    output = tmp_path / "out" / "book.npy"
    assert run_and_kill(tmp_path / "in", output, 105)
    before = {shard: shard.stat().st_mtime_ns for shard in output.parent.glob("book-train-*.npy")}
    (tmp_path / "in" / changed).touch()
    for folder in ("out", "expected"):
        prepare(tmp_path / "in", tmp_path / folder / "book.npy", workers=1, **OPTIONS)
    ids, expected = (
        {path.name: ids_of(path) for path in (tmp_path / folder).glob("*.npy")} for folder in ("out", "expected")
    )
    assert ids == expected
    unchanged = [shard.stat().st_mtime_ns == time for shard, time in sorted(before.items())]
    assert unchanged == sorted(unchanged, reverse=True)
    assert (any(unchanged), all(unchanged)) == {"none": (False, False), "some": (True, False), "all": (True, True)}[
        kept
    ]
