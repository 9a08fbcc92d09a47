"""Token files of nanoGPT and llm.c, alone, in lists and as patterns."""

import pickle
import resource

import numpy as np
import pytest
import torch
from token_files import llmc_shard, npy

from homebrew.data.dataset import TokenDataset
from homebrew.data.token_file import _DIGEST_BLOCK_TOKENS, _DIGEST_BLOCKS, TokenFile, write_tokens
from homebrew.data.token_formats import is_token_file
from homebrew.data.tokenizer import get_tokenizer
from homebrew.errors import DataError

IDS = np.random.default_rng(0).integers(0, 50_257, 1000)
LLAMA3 = {"magic": 20240801, "version": 7}


def raw(ids):
    """The content of nanoGPT's train.bin."""
    return np.asarray(ids).astype("<u2").tobytes()


def inputs(dataset):
    return dataset.batch(torch.arange(len(dataset)))[0].flatten().tolist()


FORMATS = {
    "nanoGPT": (raw(IDS), "gpt2", 50_257),
    "llm.c, GPT-2": (llmc_shard(IDS), None, 50_257),
    "llm.c, Llama 3": (llmc_shard(IDS + 70_000, **LLAMA3), None, 128_256),
}


@pytest.mark.parametrize(("content", "tokenizer", "vocab_size"), FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("open_file", [TokenDataset.from_file, TokenDataset.from_shards])
@pytest.mark.parametrize("link", [False, True])
def test_a_file_of_another_program_has_its_ids(tmp_path, content, tokenizer, vocab_size, open_file, link):
    path = tmp_path / "train.bin"
    (tmp_path / "data.bin" if link else path).write_bytes(content)
    if link:
        path.symlink_to(tmp_path / "data.bin")
    dataset = open_file(path, 10, tokenizer=tokenizer)
    offset = 70_000 if vocab_size == 128_256 else 0
    assert inputs(dataset) == (IDS + offset)[:990].tolist()
    assert dataset.vocab_size == vocab_size
    assert (dataset.tokenizer and dataset.tokenizer.name) == (None if offset else "gpt2")
    pickled = pickle.dumps(dataset.tokens)
    assert b"numpy" not in pickled, "the ids are mapped again"
    assert pickle.loads(pickled).windows(torch.tensor([5]), 3).equal(dataset.tokens.windows(torch.tensor([5]), 3))
    assert dataset.bytes_per_token is None
    with pytest.raises(ValueError, match="read-only"):
        dataset.tokens.files[0].read(0, 1)[0] = 1


@pytest.mark.parametrize("name", ["GPT-2 shard", "shard.bin"])
def test_a_shard_of_llmc_is_recognised_under_any_name(tmp_path, name):
    (tmp_path / name).write_bytes(llmc_shard(IDS))
    assert is_token_file(tmp_path / name)
    assert len(TokenDataset.from_file(tmp_path / name, 10)) == 99


def test_a_text_with_the_suffix_bin_is_a_text(tmp_path):
    text = "Où est le café ? " * 100
    (tmp_path / "book.bin").write_bytes(text.encode())
    assert not is_token_file(tmp_path / "book.bin")
    assert TokenDataset.from_file(tmp_path / "book.bin", 4, tokenizer="bytes").vocab_size == 256


@pytest.mark.parametrize("open_file", [TokenDataset.from_file, TokenDataset.from_shards])
def test_the_tokenizer_of_a_file_without_header_must_be_named(tmp_path, open_file):
    (tmp_path / "train.bin").write_bytes(raw(IDS % 65))
    with pytest.raises(DataError, match=r"train\.bin .*tokenizer=.gpt2"):
        open_file(tmp_path / "train.bin", 10)
    with pytest.raises(DataError, match="alphabet from a text"):
        open_file(tmp_path / "train.bin", 10, tokenizer="char")
    tokenizer = get_tokenizer("char", text=bytes(range(60, 125)).decode())
    dataset = open_file(tmp_path / "train.bin", 10, tokenizer=tokenizer)
    assert (dataset.vocab_size, dataset.tokenizer) == (65, tokenizer)


def test_a_tokenizer_that_needs_uint32_does_not_fit_a_file_without_header(tmp_path):
    (tmp_path / "train.bin").write_bytes(raw(IDS))
    tokenizer = get_tokenizer("char", text="".join(map(chr, range(2**18, 2**18 + 2**16 + 1))))
    with pytest.raises(DataError, match=r"train\.bin .*uint16 ids.* 65537 ids"):
        TokenDataset.from_file(tmp_path / "train.bin", 10, tokenizer=tokenizer)


def test_another_tokenizer_than_that_of_the_header_raises(tmp_path):
    (tmp_path / "gpt2.bin").write_bytes(llmc_shard(IDS))
    (tmp_path / "llama.bin").write_bytes(llmc_shard(IDS, **LLAMA3))
    with pytest.raises(DataError, match=r"gpt2\.bin has the tokenizer 'gpt2', but 'bytes'"):
        TokenDataset.from_file(tmp_path / "gpt2.bin", 10, tokenizer="bytes")
    with pytest.raises(DataError, match=r"llama\.bin has a vocabulary of 128256, but .*50257"):
        TokenDataset.from_file(tmp_path / "llama.bin", 10, tokenizer="gpt2")
    with pytest.raises(DataError, match=r"llama\.bin has vocab_size=128256, but .*gpt2\.bin has 50257"):
        TokenDataset.from_file(sorted(tmp_path.iterdir()), 10)


@pytest.mark.parametrize("pattern", ["shards/train_*.bin", "*/train_*.bin", "**/train_00[012].bin"])
@pytest.mark.parametrize("make", [llmc_shard, raw])
def test_a_pattern_gives_shards_in_the_order_of_their_names(tmp_path, monkeypatch, pattern, make):
    (tmp_path / "shards").mkdir()
    for i in (2, 0, 1):
        (tmp_path / "shards" / f"train_00{i}.bin").write_bytes(make(IDS[i * 100 : i * 100 + 100]))
    (tmp_path / "shards" / "val_000.bin").write_bytes(make(IDS[500:]))
    monkeypatch.chdir(tmp_path)
    expected = [token for i in range(3) for token in IDS[i * 100 : i * 100 + 99].tolist()]
    assert inputs(TokenDataset.from_file(pattern, 11, tokenizer="gpt2")) == expected


def test_our_shards_and_those_of_llmc_may_be_mixed(tmp_path):
    (tmp_path / "a.bin").write_bytes(llmc_shard(IDS[:101]))
    write_tokens(tmp_path / "b.npy", IDS[200:301], vocab_size=50_257, tokenizer_json=get_tokenizer("gpt2").to_json())
    dataset = TokenDataset.from_file([tmp_path / "a.bin", tmp_path / "b.npy"], 10)
    assert inputs(dataset) == IDS[:100].tolist() + IDS[200:300].tolist()


def test_a_text_among_token_files_raises(tmp_path):
    (tmp_path / "a.bin").write_bytes(llmc_shard(IDS))
    (tmp_path / "b.txt").write_text("To be, or not to be" * 9)
    with pytest.raises(DataError, match=r"b\.txt is not a token file"):
        TokenDataset.from_file([tmp_path / "a.bin", tmp_path / "b.txt"], 10)


INVALID = {
    "odd length": (raw(IDS) + b"\1", r"odd length of 2,001 bytes.*byte 2000"),
    "int32 ids": (IDS.astype("<i4").tobytes(), "every second uint16.*32-bit"),
    "int64 ids": (IDS.astype("<i8").tobytes(), "every second uint16.*64-bit"),
    "unknown magic number": (llmc_shard(IDS, magic=20240522), r"magic number 20240522 at byte 0"),
    "big-endian header": (np.array([20240520, 1, 5] + [0] * 253, ">i4").tobytes() + raw(IDS[:5]), "magic .* at byte 0"),
    "no magic number": (llmc_shard(IDS, magic=0), r"magic number 0 at byte 0"),
    "another version": (llmc_shard(IDS, version=2), r"version 2 at byte 4"),
    "version of Llama 3": (llmc_shard(IDS, version=7), r"version 7 at byte 4"),
    "too few ids": (llmc_shard(IDS, num_tokens=1001), r"3,024 bytes, but 3,026 .* 1,001 tokens .* byte 8"),
    "too many ids": (llmc_shard(IDS, num_tokens=999), r"3,024 bytes, but 3,022"),
    "negative count": (llmc_shard(IDS, num_tokens=-1), r"-1 tokens .* byte 8"),
    "odd length after a header": (llmc_shard(IDS)[:-1], r"3,023 bytes, but 3,024"),
    "uint16 ids with the magic number of uint32": (
        llmc_shard([], num_tokens=1000, **LLAMA3) + raw(IDS), "3,024 bytes, but 5,024"
    ),
    "half a header": (llmc_shard(IDS)[:500], "ends at byte 500, within .* 1024 bytes"),
    "nothing but the magic number": (llmc_shard(IDS)[:4], "ends at byte 4"),
    "no tokens": (llmc_shard([]), "There are 0 tokens"),
    "an array without metadata": (npy(IDS.astype("<u2")), "no metadata"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "message"), INVALID.values(), ids=INVALID)
def test_an_invalid_file_is_an_error_with_the_position(tmp_path, content, message):
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(DataError, match=rf"(?s)a\.bin .*{message}" if "There are" not in message else message):
        TokenDataset.from_file(tmp_path / "a.bin", 10, tokenizer="gpt2")


@pytest.mark.parametrize(
    ("make", "tokenizer", "token"),
    [(raw, "gpt2", 50_257), (llmc_shard, None, 65_535), (lambda ids: llmc_shard(ids, **LLAMA3), None, 128_256)],
)
@pytest.mark.parametrize("position", [0, 345, 989])
def test_an_id_beyond_the_vocabulary_is_an_error_with_file_and_position(tmp_path, make, tokenizer, token, position):
    ids = IDS.copy()
    ids[position] = token
    (tmp_path / "a.bin").write_bytes(make(IDS))
    (tmp_path / "b.bin").write_bytes(make(ids))
    dataset = TokenDataset.from_file([tmp_path / "a.bin", tmp_path / "b.bin"], 10, tokenizer=tokenizer)
    with pytest.raises(DataError, match=rf"b\.bin has token id {token} at position {position}"):
        inputs(dataset)


def test_more_files_than_may_be_open_raise_an_error_with_the_remedy(tmp_path):
    for i in range(300):
        (tmp_path / f"{i}.bin").write_bytes(llmc_shard(IDS[:50]))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        with pytest.raises(DataError, match=r"\.bin cannot be read.*ulimit -n"):
            TokenDataset.from_file(tmp_path / "*.bin", 10)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("name", ["[1].bin", "a*.bin"])
def test_a_file_whose_name_is_a_pattern_is_the_file(tmp_path, name):
    (tmp_path / name).write_bytes(llmc_shard(IDS))
    assert len(TokenDataset.from_file(tmp_path / name, 10)) == 99


@pytest.mark.parametrize("pattern", ["*.bin", "none/*.npy", "[ab].bin"])
def test_a_pattern_without_matches_raises(tmp_path, pattern):
    with pytest.raises(DataError, match="No file matches"):
        TokenDataset.from_file(str(tmp_path / pattern), 10)


def test_patterns_are_relative_to_a_folder_with_brackets(tmp_path, monkeypatch):
    (tmp_path / "[a]").mkdir()
    (tmp_path / "[a]" / "train.bin").write_bytes(llmc_shard(IDS))
    monkeypatch.chdir(tmp_path / "[a]")
    assert len(TokenDataset.from_file("*.bin", 10)) == 99


@pytest.mark.parametrize("num_blocks", [1, 2.5, 2 * _DIGEST_BLOCKS])
@pytest.mark.parametrize("make", [raw, llmc_shard])
def test_the_fingerprint_of_a_file_without_metadata_depends_on_its_ids(tmp_path, make, num_blocks):
    ids = np.arange(int(num_blocks * _DIGEST_BLOCK_TOKENS)) % 50_000
    digests = set()
    for changed in (None, 0, len(ids) // 2, len(ids) - 1):
        content = ids.copy()
        if changed is not None:
            content[changed] = 50_001
        (tmp_path / "a.bin").write_bytes(make(content))
        digests.add(TokenFile(tmp_path / "a.bin", 50_257).digest)
    (tmp_path / "a.bin").write_bytes(make(ids[:-1]))
    digests.add(TokenFile(tmp_path / "a.bin", 50_257).digest)
    assert len(digests) == 5
    (tmp_path / "b.bin").write_bytes(make(ids))
    assert TokenFile(tmp_path / "b.bin", 50_257).digest in digests
