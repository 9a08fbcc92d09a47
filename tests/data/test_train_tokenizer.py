"""Training of a byte-level BPE on text files."""

import subprocess
import sys

import pytest
from tokenizers import Tokenizer

from homebrew import get_tokenizer, train_tokenizer
from homebrew.data import train_tokenizer as module
from homebrew.errors import ConfigError, DataError, TokenizerError

TEXT = "the cat sat on the mat,\n\n    and the other cat's hat.\n  Grüße 中文 <|endoftext|> 1234\r\n" * 30


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT.encode())
    return path


def test_a_trained_tokenizer_is_opened_with_equal_ids(text, tmp_path):
    tokenizer = train_tokenizer(text, tmp_path / "own", vocab_size=300)
    assert tokenizer.vocab_size == 300
    opened = get_tokenizer(tmp_path / "own")
    assert opened.to_json() == tokenizer.to_json()
    reference = Tokenizer.from_file(str(tmp_path / "own" / "tokenizer.json"))
    reference.encode_special_tokens = True  # as text
    ids = opened.encode(TEXT).tolist()
    assert ids == reference.encode(TEXT).ids
    assert opened.decode(ids) == reference.decode(ids) == TEXT
    assert len(ids) < len(TEXT.encode()) / 2


@pytest.mark.parametrize("threads", ["1", "4"])
def test_the_file_depends_only_on_the_texts(text, tmp_path, threads, monkeypatch):
    train_tokenizer(text, tmp_path / "a.json", vocab_size=300)
    program = "import sys, homebrew; homebrew.train_tokenizer(sys.argv[1], sys.argv[2], vocab_size=300)"
    monkeypatch.setenv("RAYON_NUM_THREADS", threads)
    subprocess.run([sys.executable, "-c", program, text, tmp_path / "b.json"], check=True)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


@pytest.mark.parametrize("chunk_characters", [1, 7, 100])
def test_the_tokens_do_not_depend_on_chunks(text, tmp_path, chunk_characters, monkeypatch):
    expected = train_tokenizer(text, tmp_path, vocab_size=300).tokens
    chunks = module.text_chunks
    monkeypatch.setattr(module, "text_chunks", lambda path, _: chunks(path, chunk_characters))
    assert train_tokenizer(text, tmp_path, vocab_size=300).tokens == expected


@pytest.mark.parametrize("run", ["ab", "中", " ", "\n ", "!"])
def test_long_words_are_cut(run):
    """Such as DNA, base64 or a line of spaces, for which the library would take minutes."""
    chunks = ["x " + run * 40_000] * 3
    parts = [*module._cut_between_words(chunks)]
    assert "".join(parts) == "".join(chunks)
    assert max(map(len, parts)) <= 2 + 2 * 128


def test_folders_are_read(text, tmp_path):
    (tmp_path / "texts").mkdir()
    text.rename(tmp_path / "texts" / "a.txt")
    train_tokenizer(tmp_path / "texts", tmp_path / "a.json", vocab_size=300)
    train_tokenizer([tmp_path / "texts" / "a.txt"], tmp_path / "b.json", vocab_size=300)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_a_text_with_too_few_pairs_gives_a_warning(tmp_path):
    (tmp_path / "a.txt").write_text("abab")
    with pytest.warns(UserWarning, match="only 258 ids"):
        assert train_tokenizer(tmp_path / "a.txt", tmp_path, vocab_size=5000).vocab_size == 258


@pytest.mark.parametrize("vocab_size", [-1, 0, 256, 2**16 + 1, 300.0, True, None, "300"])
def test_sizes_out_of_range_are_errors(text, tmp_path, vocab_size):
    with pytest.raises(ConfigError, match="vocab_size"):
        train_tokenizer(text, tmp_path, vocab_size=vocab_size)


@pytest.mark.parametrize("data", [b"", b"\xff\xfe" * 9, b"ab " * 100_000 + b"\xff", b"a\x00b"])
def test_unusable_texts_are_errors(tmp_path, data):
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(DataError):
        train_tokenizer(tmp_path / "a.txt", tmp_path / "out.json", vocab_size=300)
    assert not (tmp_path / "out.json").exists()


def test_only_a_tokenizer_is_replaced(text, tmp_path):
    for name, data in (("data.json", b'{"text": "a"}'), ("list.json", b"[]")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=name):
            train_tokenizer(text, tmp_path / name, vocab_size=300)
        assert (tmp_path / name).read_bytes() == data
    with pytest.raises(DataError, match=r"text\.txt"):
        train_tokenizer(text, text, vocab_size=300)
    assert text.read_bytes() == TEXT.encode()


def test_a_missing_library_is_named(text, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(TokenizerError, match="pip install"):
        train_tokenizer(text, tmp_path, vocab_size=300)
