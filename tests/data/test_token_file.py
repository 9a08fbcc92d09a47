import hashlib
import json
import os
import pickle
import resource
import signal
import stat
import struct
import tracemalloc
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from homebrew.data import token_file as shards
from homebrew.data.token_file import MAX_HEADER_BYTES, TokenFile, is_token_file, write_tokens
from homebrew.errors import DataError

IDS = np.arange(0, 600, 3)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "made.tokens"
    write_tokens(path, IDS, vocab_size=600, tokenizer_json={"name": "own"}, num_text_bytes=700, source="threes")
    return path


def with_header(path, **changes):
    """A file whose header was changed; `...` leaves a field out."""
    data = path.read_bytes()
    (length,) = struct.unpack_from("<I", data, 12)
    header = json.loads(data[16 : 16 + length]) | changes
    text = json.dumps({name: value for name, value in header.items() if value is not ...}).encode()
    path.write_bytes(data[:12] + struct.pack("<I", len(text)) + text + data[16 + length :])


@pytest.mark.parametrize(("vocab_size", "dtype"), [(600, "uint16"), (2**16, "uint16"), (2**16 + 1, "uint32")])
def test_what_is_written_is_read(tmp_path, vocab_size, dtype):
    ids = np.append(IDS, vocab_size - 1)
    written = write_tokens(tmp_path / "a", ids, vocab_size=vocab_size, source="ünïcode")
    file = TokenFile.open(tmp_path / "a")
    assert file.header == written
    assert (written.dtype, written.num_tokens, written.source) == (dtype, 201, "ünïcode")
    assert written.sha256 == hashlib.sha256(ids.astype(dtype).tobytes()).hexdigest()
    for start, stop in [(0, 201), (0, 0), (201, 201), (5, 6), (100, 201)]:
        assert file.read(start, stop).tolist() == ids[start:stop].tolist()
    file.check()


def test_the_header_keeps_what_it_was_told(path):
    header = TokenFile.open(path).header
    assert (header.vocab_size, header.tokenizer, header.num_text_bytes) == (600, {"name": "own"}, 700)


@pytest.mark.parametrize(
    "ids",
    [iter([IDS[:7], IDS[7:7], IDS[7:]]), torch.from_numpy(IDS), [torch.from_numpy(IDS[:1]), IDS[1:].astype("u2")]],
)
def test_ids_come_in_any_rows(tmp_path, ids):
    write_tokens(tmp_path / "a", ids, vocab_size=600)
    assert TokenFile.open(tmp_path / "a").read(0, 200).tolist() == IDS.tolist()


def test_a_file_follows_the_umask_and_nothing_is_left_beside_it(tmp_path):
    before = os.umask(0o027)
    try:
        write_tokens(tmp_path / "a", IDS, vocab_size=600)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]


def breaking_off():
    yield IDS
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("ids", "vocab_size", "error", "said"),
    [
        ([], 600, DataError, "would hold no token"),
        ([IDS, np.array([600])], 600, DataError, "Token id 600 is outside the vocabulary of 600"),
        (np.array([3, -1]), 600, DataError, "Token id -1 is outside"),
        (np.array([0.5]), 600, DataError, "got float64"),
        (np.zeros((2, 2), int), 600, DataError, r"shape \(2, 2\)"),
        ([1, 2, 3], 600, DataError, "integers in one row"),
        (IDS, 0, DataError, "vocab_size=0"),
        (IDS, 2**31 + 1, DataError, "vocab_size="),
        (breaking_off(), 600, KeyboardInterrupt, None),
    ],
)
def test_a_failed_write_leaves_the_old_file(path, ids, vocab_size, error, said):
    before = path.read_bytes()
    with pytest.raises(error, match=said):
        write_tokens(path, ids, vocab_size=vocab_size)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_that_is_not_there_or_a_description_too_long_is_refused(tmp_path):
    (tmp_path / "file").write_text("of the user's")
    with pytest.raises(DataError, match=r"file/a .* could not be written: Not a directory|File exists"):
        write_tokens(tmp_path / "file" / "a", IDS, vocab_size=600)
    with pytest.raises(DataError, match="is there and is no token file"):
        write_tokens(tmp_path / "file", IDS, vocab_size=600)
    (tmp_path / "file").unlink()
    with pytest.raises(DataError, match="to_json"):
        write_tokens(tmp_path / "a", IDS, vocab_size=600, tokenizer_json={"own": "x" * MAX_HEADER_BYTES})
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_an_error_that_says_so(path):
    before = path.read_bytes()
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, usual[1]))  # Python ignores SIGXFSZ: a write fails instead
    try:
        with pytest.raises(DataError, match=r"bytes so far\) could not be written: File too large\. Free some space"):
            write_tokens(path, (np.zeros(500_000, int) for _ in range(4)), vocab_size=9)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_killed_write_leaves_the_old_file(path):
    before = path.read_bytes()
    child = os.fork()
    if child == 0:
        write_tokens(path, (os.kill(os.getpid(), signal.SIGKILL) for _ in range(1)), vocab_size=9)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert path.read_bytes() == before
    TokenFile.open(path).check()


def test_bytes_are_on_the_disk_before_the_name_is(path, monkeypatch):
    order = []
    for name in ("fsync", "replace"):
        true = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, true=true: (order.append(name), true(*args))[1])
    write_tokens(path, IDS, vocab_size=600)
    assert order == ["fsync", "replace", "fsync"]


def test_a_file_may_be_named_by_a_link(path):
    """As the files of the hub's cache are."""
    link = path.parent / "link"
    link.symlink_to(path)
    assert is_token_file(link)
    assert TokenFile.open(link).read(0, 200).tolist() == IDS.tolist()


def test_pipes_folders_and_nothing_are_refused_by_a_link_too(path):
    folder = path.parent
    os.mkfifo(folder / "pipe")
    (folder / "to-pipe").symlink_to("pipe")
    (folder / "to-itself").symlink_to("to-itself")
    for name, said in [
        ("pipe", "not a regular file"),
        ("to-pipe", "not a regular file"),
        ("to-itself", "Too many levels of symbolic links"),
        ("", "not a regular file"),
        ("none", "No such file"),
        ("a\0b", "no path"),
    ]:
        with pytest.raises(DataError, match=said):
            TokenFile.open(folder / name)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "0 bytes"),
        (b"HBTOKENS", "8 bytes"),
        (b"\x80\x04" + bytes(100), "begins with"),
        (b"HBTOKENS" + struct.pack("<II", 2, 2) + b"{}", "version 2"),
        (b"HBTOKENS" + struct.pack("<II", 1, 2**32 - 1) + b"{}", "4,294,967,295 bytes"),
        (b"HBTOKENS" + struct.pack("<II", 1, 3) + b"{}", "3 bytes"),
        (b"HBTOKENS" + struct.pack("<II", 1, 2) + b"{}", "must be an object with"),
        (b"HBTOKENS" + struct.pack("<II", 1, 2) + b"[]", "must be an object with"),
        (b"HBTOKENS" + struct.pack("<II", 1, 2) + b"\xff{", "is not JSON"),
        (b"HBTOKENS" + struct.pack("<II", 1, 10**6) + b"[" * 10**6, "is not JSON"),
        (b"HBTOKENS" + struct.pack("<II", 1, 10**5) + b"9" * 10**5, "is not JSON"),
    ],
)
def test_what_is_no_token_file_is_refused(tmp_path, data, said):
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(DataError, match=said):
        TokenFile.open(tmp_path / "a")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dtype", "float32"), ("dtype", ["uint16"]), ("num_tokens", 0), ("num_tokens", -200), ("num_tokens", 200.0),
        ("num_tokens", True), ("num_tokens", 2**70), ("num_tokens", 201), ("num_tokens", 2**60), ("vocab_size", 0),
        ("vocab_size", 2**40), ("vocab_size", None), ("tokenizer", "gpt2"), ("num_text_bytes", 0),
        ("num_text_bytes", "700"), ("sha256", 5), ("sha256", "ab"), ("source", {}), ("source", ...),
    ],
)  # fmt: skip
def test_a_header_that_lies_is_refused(path, field, value):
    with_header(path, **{field: value})
    with pytest.raises(DataError, match=field if field != "num_tokens" else "num_tokens|tokens its header"):
        TokenFile.open(path)


def test_a_huge_file_of_nothing_is_refused_without_reading_it(tmp_path):
    with (tmp_path / "a").open("wb") as file:
        file.write(b"HBTOKENS" + struct.pack("<II", 1, 2**31))
        file.truncate(2**40)
    with pytest.raises(DataError, match="damaged"):
        TokenFile.open(tmp_path / "a")


def test_another_hash_is_found_by_a_check(path):
    with_header(path, sha256="0" * 64)
    file = TokenFile.open(path)
    with pytest.raises(DataError, match=f"damaged.*{hashlib.sha256(IDS.astype('<u2').tobytes()).hexdigest()}"):
        file.check()


def test_an_id_outside_the_vocabulary_is_never_handed_out(path):
    with_header(path, vocab_size=300)
    file = TokenFile.open(path)
    assert file.read(0, 100).max() == 297
    with pytest.raises(DataError, match="token id 300 between 100 and 101, outside its vocabulary of 300"):
        file.read(100, 101)
    with pytest.raises(DataError, match="outside its vocabulary"):
        file.check()


@pytest.mark.parametrize(("start", "stop"), [(-1, 5), (0, 201), (5, 4), (300, 301)])
def test_positions_that_are_not_there_are_refused(path, start, stop):
    with pytest.raises(DataError, match="tokens 0 to 200"):
        TokenFile.open(path).read(start, stop)


def test_a_file_cut_while_in_use_is_an_error(path):
    file = TokenFile.open(path)
    os.truncate(path, path.stat().st_size - 10)
    assert len(file.read(0, 195)) == 195
    with pytest.raises(DataError, match="cut while in use"):
        file.read(0, 200)


def test_a_file_is_closed_with_its_last_reference_and_opens_again_elsewhere(path):
    def descriptors():
        return len(list(Path("/dev/fd").iterdir()))

    before = descriptors()
    file = TokenFile.open(path)
    assert descriptors() == before + 1
    assert pickle.loads(pickle.dumps(file)).header == file.header, "as a process started with spawn has it"
    del file
    assert descriptors() == before


def test_a_part_is_read_without_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_AT_ONCE", 2**16)
    count = 2**22
    tracemalloc.start()
    try:
        write_tokens(
            tmp_path / "a", (np.full(2**14, i % 600, np.uint16) for i in range(count // 2**14)), vocab_size=600
        )
        file = TokenFile.open(tmp_path / "a")
        file.check()
        for start in range(0, count - 1000, 100_003):
            file.read(start, start + 1000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**20, "of 8 MiB"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A whole file, and another path."""
    folder = tmp_path_factory.mktemp("sound")
    write_tokens(folder / "sound", IDS[:40], vocab_size=600, source="x")
    return (folder / "sound").read_bytes(), folder / "damaged"


EDITS = st.lists(st.tuples(st.integers(0, 400), st.integers(0, 6), st.binary(max_size=6)), max_size=3)
"""Where, how many bytes to take out, and what to put there."""


@pytest.mark.slow
@settings(max_examples=1000, deadline=timedelta(seconds=20), database=None, suppress_health_check=list(HealthCheck))
@given(prefix=st.sampled_from([None, None, None, b"", b"HBTOKENS\x01\0\0\0"]), body=st.binary(max_size=64), edits=EDITS)
@example(prefix=None, body=b"", edits=[])
def test_a_damaged_file_gives_the_right_tokens_or_an_error(sound, bounded_memory, prefix, body, edits):
    data, path = sound
    if prefix is not None:
        data = prefix + body
    for at, out, put in edits:
        data = data[:at] + put + data[at + out :]
    path.write_bytes(data)
    try:
        with bounded_memory():
            file = TokenFile.open(path)
            file.check()
            tokens = file.read(0, len(file))
    except DataError:
        return
    assert tokens.tolist() == IDS[:40].tolist()


def test_a_file_cut_anywhere_or_with_a_bit_of_its_tokens_flipped_is_an_error(sound):
    data, path = sound
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(DataError):
            TokenFile.open(path)
    for bit in range(8 * (len(data) - 80), 8 * len(data), 7):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(DataError):
            TokenFile.open(path).check()
