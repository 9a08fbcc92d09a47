import dataclasses
import hashlib
import json
import os
import pickle
import resource
import signal
import stat
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from child_processes import exit_code, fork
from hypothesis import example, given, settings
from hypothesis import strategies as st
from token_files import npy

from homebrew.data.dataset import TokenDataset
from homebrew.data.token_file import TokenFile, write_tokens
from homebrew.data.token_metadata import TokenMetadata, metadata_path
from homebrew.data.tokenizer import CharTokenizer
from homebrew.errors import DataError

IDS = np.arange(0, 600, 3)


@pytest.fixture
def path(tmp_path):
    """A valid token file."""
    path = tmp_path / "book.npy"
    write_tokens(path, IDS, vocab_size=600, tokenizer_json={"name": "own"}, num_text_bytes=700, source="threes")
    return path


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read_all(path):
    file = TokenFile(path)
    file.verify()
    return file.read(0, len(file)).tolist()


@pytest.mark.parametrize(("vocab_size", "dtype"), [(600, "uint16"), (2**16, "uint16"), (2**16 + 1, "uint32")])
def test_write_and_read(tmp_path, vocab_size, dtype):
    path, ids = tmp_path / "book.npy", np.append(IDS, vocab_size - 1)
    written = write_tokens(path, ids, vocab_size=vocab_size, source="ünïcode")
    assert TokenFile(path).metadata == written
    assert (written.num_tokens, written.source) == (201, "ünïcode")
    assert written.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert read_all(path) == ids.tolist()
    for start, stop in [(0, 0), (201, 201), (5, 6), (100, 201)]:
        assert TokenFile(path).read(start, stop).tolist() == ids[start:stop].tolist()
    array = np.load(path, allow_pickle=False)
    assert array.dtype == dtype
    assert array.tolist() == ids.tolist()


def test_metadata_is_plain_json(path):
    fields = json.loads(metadata_path(path).read_text())
    assert fields.pop("metadata_sha256")
    assert fields == {
        "format_version": 1,
        "vocab_size": 600,
        "num_tokens": 200,
        "num_text_bytes": 700,
        "tokenizer": {"name": "own"},
        "source": "threes",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }


@pytest.mark.parametrize(
    "ids",
    [iter([IDS[:7], IDS[7:7], IDS[7:]]), torch.from_numpy(IDS), [torch.from_numpy(IDS[:1]), IDS[1:].astype("u2")]],
)
def test_ids_may_be_written_in_several_arrays(tmp_path, ids):
    write_tokens(tmp_path / "book.npy", ids, vocab_size=600)
    assert read_all(tmp_path / "book.npy") == IDS.tolist()


def test_files_follow_the_umask_and_no_temporary_file_remains(tmp_path):
    umask = os.umask(0o027)
    try:
        write_tokens(tmp_path / "book.npy", IDS, vocab_size=600)
    finally:
        os.umask(umask)
    assert {path.name for path in tmp_path.iterdir()} == {"book.npy", "book.json"}
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o640 for path in tmp_path.iterdir())


def interrupted_ids():
    yield IDS
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("ids", "vocab_size", "error", "message"),
    [
        ([], 600, DataError, "no tokens to write"),
        ([IDS, np.array([600])], 600, DataError, "Token id 600 is outside the vocabulary of 600"),
        (np.array([3, -1]), 600, DataError, "Token id -1 is outside"),
        (np.array([0.5]), 600, DataError, "are float64"),
        (np.zeros((2, 2), int), 600, DataError, r"shape \(2, 2\)"),
        ([1, 2, 3], 600, DataError, "one-dimensional sequence of integers"),
        (IDS, 0, DataError, "vocab_size=0"),
        (IDS, 2**31 + 1, DataError, "vocab_size="),
        (interrupted_ids(), 600, KeyboardInterrupt, None),
    ],
)
def test_a_failed_write_keeps_the_old_files(path, ids, vocab_size, error, message):
    before = contents(path.parent)
    with pytest.raises(error, match=message):
        write_tokens(path, ids, vocab_size=vocab_size)
    assert contents(path.parent) == before


def test_an_existing_token_file_is_replaced(path):
    write_tokens(path, IDS[:5], vocab_size=600)
    assert read_all(path) == IDS[:5].tolist()


@pytest.mark.parametrize(
    ("array", "metadata"),
    [
        (None, b""),
        (None, b'{\n  "format_version": 1,\n  "vocab'),
        (None, b'{"format_version": 9, "metadata_sha256": ""}'),
        (None, "missing"),
        (b"", "missing"),
        (b"damaged", None),
        (b"", None),
        ("missing", None),
    ],
)
def test_a_damaged_token_file_is_replaced(path, array, metadata):
    for file, damage in [(path, array), (metadata_path(path), metadata)]:
        if damage == "missing":
            file.unlink()
        elif damage is not None:
            file.write_bytes(damage)
    write_tokens(path, IDS[:5], vocab_size=600)
    assert read_all(path) == IDS[:5].tolist()


@pytest.mark.parametrize(
    ("array", "metadata", "foreign"),
    [
        (b"text", None, "book.npy"),
        (b"text", b"text", "book.npy"),
        (npy(IDS.astype("<f4")), None, "book.npy"),
        (npy(IDS.astype("<u2").reshape(2, 100)), None, "book.npy"),
        (npy(IDS.astype("<u2")), b'{"width": 3}', "book.json"),
    ],
)
def test_foreign_arrays_and_json_files_are_not_overwritten(tmp_path, array, metadata, foreign):
    files = {name: data for name, data in [("book.npy", array), ("book.json", metadata)] if data is not None}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=f"{foreign} exists and does not belong to a token file"):
        write_tokens(tmp_path / "book.npy", IDS, vocab_size=600)
    assert contents(tmp_path) == files


@pytest.mark.parametrize(
    ("name", "existing", "message"),
    [
        ("book.txt", "book.txt", "must end in .npy"),
        ("book.json", "book.json", "must end in .npy"),
        ("book.npy", "book.npy", "book.npy exists and does not belong to a token file"),
        ("book.npy", "book.json", "book.json exists and does not belong to a token file"),
        ("folder/book.npy", "folder", "cannot be written: (Not a directory|File exists)"),
    ],
)
def test_other_files_are_not_overwritten(tmp_path, name, existing, message):
    (tmp_path / existing).write_text("{}")
    with pytest.raises(DataError, match=message):
        write_tokens(tmp_path / name, IDS, vocab_size=600)
    assert contents(tmp_path) == {existing: b"{}"}


def test_a_full_disk_raises_and_keeps_the_old_files(path):
    before = contents(path.parent)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, limits[1]))  # Python ignores SIGXFSZ, so writing fails
    try:
        with pytest.raises(DataError, match=r"cannot be written: File too large.*Free some disk space"):
            write_tokens(path, (np.zeros(500_000, int) for _ in range(4)), vocab_size=9)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(path.parent) == before


def test_a_killed_write_keeps_the_old_files(path):
    kill = (os.kill(os.getpid(), signal.SIGKILL) for _ in range(1))
    assert exit_code(fork(lambda: write_tokens(path, kill, vocab_size=9))) == -signal.SIGKILL
    assert read_all(path) == IDS.tolist()


def test_a_write_killed_between_the_two_renames_is_detected(path):
    old = metadata_path(path).read_bytes()
    write_tokens(path, IDS[::-1], vocab_size=600)
    metadata_path(path).write_bytes(old)
    with pytest.raises(DataError, match="corrupt: its SHA-256"):
        TokenFile(path).verify()


def test_each_file_is_synced_before_its_rename_and_the_metadata_is_renamed_last(path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda old, new: (calls.append(Path(new).name), replace(old, new))[1])
    write_tokens(path, IDS, vocab_size=600)
    assert calls == ["fsync", "book.npy", "fsync", "fsync", "book.json", "fsync"]


def test_pipes_directories_and_missing_files_raise(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link-to-pipe").symlink_to("pipe")
    for name, message in [
        ("pipe", "not a regular file"),
        ("link-to-pipe", "not a regular file"),
        ("", "not a regular file"),
        ("missing", "No such file"),
    ]:
        with pytest.raises(DataError, match=message):
            TokenFile(tmp_path / name)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not in NumPy's .npy format"),
        (pickle.dumps(IDS), "not in NumPy's .npy format"),
        (b"\x93NUMPY", "is corrupt.* differs at byte 6"),
        (b"\x93NUMPY\x09\x00" + bytes(200), "is corrupt.* differs at byte 6"),
        (b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 2**16, "is corrupt"),
        (npy(np.array([object()])), "is corrupt"),
        (npy(IDS[:5].astype("<u2")), r"is not an array of uint16 with shape \(200,\)"),
        (npy(IDS.astype("<u2"))[:-1], "is corrupt.* 527 bytes instead of 528"),
        (npy(IDS.astype("<u2")) + bytes(10**4), "is corrupt.* 10,528 bytes instead of 528"),
        (npy(IDS), "is corrupt"),
        (npy(IDS.astype(">u2")), "is corrupt.* differs at byte 21"),
        (npy(IDS.astype("<u2").reshape(2, 100)), "is corrupt"),
    ],
)
def test_other_arrays_raise(path, data, message):
    path.write_bytes(data)
    with pytest.raises(DataError, match=message):
        TokenFile(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "not the metadata of a token file"),
        ('{"format_version": 2, "metadata_sha256": ""}', "format version 2, but this version of homebrew reads 1"),
    ],
)
def test_other_metadata_raises(path, text, message):
    metadata_path(path).write_text(text)
    with pytest.raises(DataError, match=message):
        TokenFile(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", "600"),
        ("vocab_size", None),
        ("num_tokens", 200.0),
        ("num_tokens", True),
        ("num_text_bytes", "700"),
        ("tokenizer", "gpt2"),
        ("sha256", 5),
        ("source", {}),
    ],
)
def test_metadata_of_wrong_types_raises(path, field, value):
    metadata = TokenFile(path).metadata
    metadata_path(path).write_text(dataclasses.replace(metadata, **{field: value}).to_json())
    with pytest.raises(DataError, match=rf"book\.json.*{field}="):
        TokenFile(path)


@pytest.mark.parametrize("changes", [{"num_tokens": 201}, {"num_tokens": 2**60}, {"vocab_size": 2**40}])
def test_metadata_that_does_not_match_the_array_raises(path, changes):
    metadata_path(path).write_text(dataclasses.replace(TokenFile(path).metadata, **changes).to_json())
    with pytest.raises(DataError, match="as its metadata says"):
        TokenFile(path)


def test_missing_metadata_raises(path):
    metadata_path(path).unlink()
    with pytest.raises(DataError, match=r"book\.json does not exist.*prepare.*write_tokens"):
        TokenFile(path)


def test_modified_metadata_raises(path):
    text = metadata_path(path).read_text()
    metadata_path(path).write_text(text.replace('"vocab_size": 600', '"vocab_size": 601'))
    with pytest.raises(DataError, match="was modified"):
        TokenFile(path)


def flips(data):
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        yield bytes(flipped)


@pytest.mark.parametrize("source", ["threes", "café\x1b"])  # written as \u00e9, which is also \u00E9
def test_every_flipped_bit_in_the_metadata_is_detected(tmp_path, source):
    tokenizer = CharTokenizer("\x1babc")
    path = tmp_path / "book.npy"
    write_tokens(path, IDS % 4, vocab_size=4, tokenizer_json=tokenizer.to_json(), source=source)
    for flipped in flips(metadata_path(path).read_bytes()):
        metadata_path(path).write_bytes(flipped)
        with pytest.raises(DataError):
            TokenMetadata.read(metadata_path(path))


@pytest.mark.parametrize("first_id", [0, ord(" "), ord("\n"), 2**16 - 1])
def test_every_flipped_bit_in_the_arrays_header_is_detected(tmp_path, first_id):
    path = tmp_path / "book.npy"
    write_tokens(path, np.full(9, first_id), vocab_size=2**16)
    data = path.read_bytes()
    for header in flips(data[:128]):
        path.write_bytes(header + data[128:])
        with pytest.raises(DataError):
            TokenFile(path)


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
@pytest.mark.parametrize("num_tokens", [1, 10**6])
def test_the_array_is_what_numpy_writes(tmp_path, dtype, num_tokens):
    ids = (np.arange(num_tokens) % 600).astype(dtype)
    write_tokens(tmp_path / "book.npy", ids, vocab_size=2**16 if dtype == "<u2" else 2**17)
    assert (tmp_path / "book.npy").read_bytes() == npy(ids)


def test_an_id_outside_the_vocabulary_raises_when_it_is_read(path):
    array = np.load(path)
    array[100] = 600
    np.save(path, array)
    file = TokenFile(path)
    assert file.read(0, 100).max() == 297
    with pytest.raises(DataError, match="token id 600 at position 100, outside the vocabulary of 600"):
        file.read(90, 110)
    with pytest.raises(DataError, match="corrupt: its SHA-256"):
        file.verify()


def test_verify_converts_errors_while_reading(path):
    file = TokenFile(path)
    path.unlink()
    with pytest.raises(DataError, match="No such file"):
        file.verify()


def test_a_file_may_be_pickled_for_another_process(path):
    data = pickle.dumps(TokenFile(path))
    assert len(data) < 500
    assert pickle.loads(data).read(0, 200).tolist() == IDS.tolist()


def test_writing_and_reading_need_little_memory(tmp_path):
    path, num_tokens = tmp_path / "book.npy", 2**23
    tracemalloc.start()
    try:
        write_tokens(path, (np.full(2**14, i % 600, np.uint16) for i in range(num_tokens // 2**14)), vocab_size=600)
        file = TokenFile(path)
        file.verify()
        for start in range(0, num_tokens - 1000, 100_003):
            file.read(start, start + 1000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**20, "the file has 16 MiB"


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    """A valid token file, and the contents of its two files."""
    path = tmp_path_factory.mktemp("valid") / "book.npy"
    write_tokens(path, IDS[:40], vocab_size=600, source="x")
    return path, path.read_bytes(), metadata_path(path).read_bytes()


EDITS = st.lists(st.tuples(st.integers(0, 500), st.integers(0, 6), st.binary(max_size=6)), max_size=3)
"""Positions, numbers of bytes to remove there, and bytes to insert."""


def edited(data, edits):
    for position, length, inserted in edits:
        data = data[:position] + inserted + data[position + length :]
    return data


@pytest.mark.slow
@settings(max_examples=300)
@given(array_edits=EDITS, metadata_edits=EDITS)
@example(array_edits=[], metadata_edits=[])
def test_a_corrupt_file_gives_the_right_tokens_or_an_error(valid, bounded_memory, array_edits, metadata_edits):
    path, array, metadata = valid
    path.write_bytes(edited(array, array_edits))
    metadata_path(path).write_bytes(edited(metadata, metadata_edits))
    try:
        with bounded_memory():
            tokens = read_all(path)
    except DataError:
        return
    assert tokens == IDS[:40].tolist()


def test_truncated_files_and_flipped_bits_raise(valid):
    path, array, metadata = valid
    metadata_path(path).write_bytes(metadata)
    for size in range(0, len(array), 3):
        path.write_bytes(array[:size])
        with pytest.raises(DataError):
            TokenFile(path)
    for bit in range(0, 8 * len(array), 13):
        flipped = bytearray(array)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(DataError):
            TokenFile(path).verify()


@pytest.mark.parametrize("ids", [None, 5])
def test_ids_that_are_no_sequence_raise(tmp_path, ids):
    for use in (lambda: write_tokens(tmp_path / "a.npy", ids, vocab_size=5), lambda: TokenDataset.from_tokens(ids, 2)):
        with pytest.raises(DataError, match="Token ids"):
            use()
    assert not contents(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("vocab_size", value) for value in (5.0, True, "5", None, 0, 2**32)),
        *(("num_text_bytes", value) for value in (2.5, True, "3", -1)),
        *(("source", value) for value in (Path("x"), 5)),
        *(("tokenizer_json", value) for value in ("gpt2", [1], {"a": {1}}, {"a": np.int64(1)})),
    ],
)
def test_metadata_that_could_not_be_read_is_not_written(tmp_path, name, value):
    with pytest.raises(DataError, match=name.removesuffix("_json")):
        write_tokens(tmp_path / "a.npy", np.array([1, 2]), **{"vocab_size": 5, name: value})
    assert not contents(tmp_path)


def test_integers_of_numpy_are_written_as_integers(tmp_path):
    metadata = write_tokens(tmp_path / "a.npy", [[1, 2]], vocab_size=np.int64(5), num_text_bytes=np.uint8(3))
    assert TokenFile(tmp_path / "a.npy").metadata == metadata
