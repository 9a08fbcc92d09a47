import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from homebrew import TokenDataset, get_tokenizer
from homebrew.data import gpt2_tokenizer, tiktoken_tokenizer
from homebrew.data.fast_tokenizer import FastEncoding
from homebrew.data.preparation import encode_part
from homebrew.data.preparation import prepare as prepare_module
from homebrew.data.preparation.prepare import prepare
from homebrew.data.text_file import text_chunks
from homebrew.data.token_file import TokenFile
from homebrew.data.token_formats import is_token_file
from homebrew.data.tokenizer import ByteTokenizer, CharTokenizer, encode_chunks
from homebrew.errors import DataError

# No control characters, many of which make a file binary.
TEXTS = st.text(st.sampled_from("a's —\n\r\t é,🙂1"), max_size=60) | st.text(
    st.characters(codec="utf-8", exclude_categories=["Cc"]), max_size=40
)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("prepare") / "text.txt"


@settings(max_examples=200)
@given(text=TEXTS, chunk_characters=st.integers(1, 12))
def test_preparing_in_chunks_equals_encoding_at_once(path, text, chunk_characters):
    path.write_bytes(text.encode())
    chunks = list(text_chunks(path, chunk_characters))
    assert "".join(chunks) == text
    assert all(len(chunk) == chunk_characters for chunk in chunks[:-1])
    for name in ("gpt2", "bytes"):
        tokenizer = get_tokenizer(name)
        ids = [i for array in encode_chunks(tokenizer, iter(chunks)) for i in array]
        assert ids == tokenizer.encode(text).tolist()


REPEATED = ["a", "ACGT", "中文没有空格", "0123456789", "!?", " ", "\n", "A text of one line. "]


@pytest.mark.parametrize(
    ("tokenizer", "is_fast", "text"),
    [("gpt2", is_fast, text) for is_fast in (False, True) for text in REPEATED]
    + [("bytes", False, "ACGT"), ("char", False, "ACGT")],
)
def test_memory_does_not_depend_on_white_space(path, tmp_path, monkeypatch, tokenizer, is_fast, text):
    monkeypatch.setattr(prepare_module, "_MIN_FAST_BYTES", 0)
    monkeypatch.setattr(prepare_module, "has_fast_tokenizer", lambda *_: is_fast)
    encoded = []
    monkeypatch.setattr(FastEncoding, "encode_special", recording(FastEncoding.encode_special, encoded))
    for cls in (CharTokenizer, ByteTokenizer):
        monkeypatch.setattr(cls, "encode", recording(cls.encode, encoded))
    encoding = gpt2_tokenizer._gpt2_encoding()
    monkeypatch.setattr(type(encoding), "encode_ordinary", recording(type(encoding).encode_ordinary, encoded))
    text = (text * 20_000)[:20_000]
    path.write_text(text, newline="")
    for module in (encode_part, tiktoken_tokenizer):
        monkeypatch.setattr(module, "CHUNK_CHARACTERS", 1000)
    prepare([path], tmp_path / "out.npy", tokenizer=tokenizer)
    assert max(encoded) <= 1000 + 256 * 64 * (tokenizer == "gpt2")  # its longest tokens have 64 characters
    prepared = TokenFile(tmp_path / "out.npy")
    assert prepared.read(0, len(prepared)).tolist() == get_tokenizer(tokenizer, text=text).encode(text).tolist()


def recording(encode, lengths):
    """Return `encode`, which appends the length of every text that it encodes."""

    def recorded(self, text):
        lengths.append(len(text))
        return encode(self, text)

    return recorded


@pytest.mark.parametrize("tokenizer", ["gpt2", "bytes", "char"])
def test_a_prepared_text_gives_the_dataset_of_the_text(path, tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(encode_part, "CHUNK_CHARACTERS", 7)
    path.write_text("Grüße —\nto all\n" * 10)
    sizes = prepare([path], tmp_path / "out.npy", tokenizer=tokenizer)
    prepared = TokenDataset.from_shards(tmp_path / "out.npy", 8)
    direct = TokenDataset.from_file(path, 8, tokenizer=tokenizer)
    assert prepared[1][0].tolist() == direct[1][0].tolist()
    assert len(prepared) == len(direct)
    assert prepared.tokenizer.to_json() == direct.tokenizer.to_json()
    assert prepared.bytes_per_token == direct.bytes_per_token
    assert sizes["train"].num_text_bytes == path.stat().st_size
    assert is_token_file(tmp_path / "out.npy")
    assert not is_token_file(path)


def test_texts_are_separated_by_the_end_of_text_token(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(f"{name}\n")
    prepare([tmp_path / "a", tmp_path / "b"], tmp_path / "gpt2.npy")
    prepare([tmp_path / "a", tmp_path / "b"], tmp_path / "bytes.npy", tokenizer="bytes")
    gpt2, plain = (TokenFile(tmp_path / name) for name in ("gpt2.npy", "bytes.npy"))
    assert gpt2.read(0, len(gpt2)).tolist() == [64, 198, 50256, 65, 198]
    assert bytes(plain.read(0, len(plain)).tolist()) == b"a\nb\n"


def test_invalid_texts_raise_and_nothing_is_written(tmp_path):
    (tmp_path / "good").write_text("good")
    (tmp_path / "bad").write_bytes(b"a\xff")
    (tmp_path / "empty").touch()
    for name, message in (("bad", "UTF-8"), ("missing", "missing"), ("empty", "no text")):
        paths = [tmp_path / "good", tmp_path / name] if name != "empty" else [tmp_path / name]
        with pytest.raises(DataError, match=message):
            prepare(paths, tmp_path / "out.npy", tokenizer="bytes")
    assert {path.name for path in tmp_path.iterdir()} == {"good", "bad", "empty"}


def test_a_token_file_as_text_raises(path, tmp_path):
    prepare([path], tmp_path / "a.npy", tokenizer="bytes")
    with pytest.raises(DataError, match=r"a\.npy is a token file"):
        prepare([tmp_path / "a.npy"], tmp_path / "b.npy")


def test_a_pipe_raises_without_blocking(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="pipe' is not a regular file"):
        prepare([tmp_path / "pipe"], tmp_path / "out.npy")
