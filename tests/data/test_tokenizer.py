import hashlib
import time
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Tokenizer as TheirTokenizer

from homebrew.data import tokenizer
from homebrew.data.tokenizer import dataset_tokenizer, get_tokenizer, gpt2_vocabulary_files, tokenizer_from_json
from homebrew.errors import DataError, TokenizerError

WORDS = st.text("aZ'sdtmrelv 0١½ \t\n\r\u00a0\u2028.,!é中😀\u0301\x00", max_size=40)
"""Where GPT-2's rules for cutting words apart meet."""


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    for name, data in gpt2_vocabulary_files().items():
        (folder / name).write_bytes(data)
    return TheirTokenizer(vocab=str(folder / "encoder.json"), merges=str(folder / "vocab.bpe"))


@pytest.fixture
def nothing_at_hand(monkeypatch, tmp_path):
    """No package, an empty cache, and a network where nobody listens; the cache's folder."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(tokenizer, "installed_files", lambda *_: [])
    monkeypatch.setattr(tokenizer, "_GPT2_URL", "http://127.0.0.1:9/")
    tokenizer._gpt2_encoding.cache_clear()
    yield tmp_path
    tokenizer._gpt2_encoding.cache_clear()


@settings(max_examples=1000, deadline=None)
@given(text=st.text(max_size=30) | WORDS)
def test_gpt2_ids_are_those_of_transformers_and_decode(theirs, text):
    ours = get_tokenizer("gpt2")
    ids = ours.encode(text).tolist()
    assert ids == theirs.encode(text, split_special_tokens=True)
    assert ours.decode(ids) == text


def test_gpt2_knows_its_ids():
    gpt2 = get_tokenizer("gpt2")
    assert gpt2.encode("Hello, world!").tolist() == [15496, 11, 995, 0]
    assert gpt2.decode([gpt2.end_of_text_id]) == "<|endoftext|>"
    assert len(gpt2.encode("<|endoftext|>")) > 1, "in a text it is text"
    assert sorted({bytes(gpt2.decode_bytes([i])) for i in range(256)}) == [bytes([i]) for i in range(256)]


@given(text=st.text(max_size=30))
def test_bytes_and_characters_decode(text):
    for mine in (get_tokenizer("bytes"), get_tokenizer("char", text=text + "x")):
        ids = mine.encode(text)
        assert mine.decode(ids) == text
        assert mine.decode_bytes(ids) == text.encode()
        assert tokenizer_from_json(mine.to_json()).encode(text).tolist() == ids.tolist()
        assert all(0 <= i < mine.vocab_size for i in ids)


def test_half_a_character_decodes_to_the_replacement():
    assert get_tokenizer("bytes").decode(list("é".encode())[:1]) == "�"


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [("gpt3", None, "no tokenizer 'gpt3'"), ("char", None, "takes its alphabet"), ("char", "", "takes its alphabet")],
)
def test_unknown_names_are_refused(name, text, said):
    with pytest.raises(DataError, match=said):
        get_tokenizer(name, text=text)


def test_what_is_outside_is_refused():
    with pytest.raises(DataError, match="'c' is not among the 2"):
        get_tokenizer("char", text="ab").encode("abc")
    for mine in (get_tokenizer("bytes"), get_tokenizer("gpt2"), get_tokenizer("char", text="ab")):
        for wrong in (-1, mine.vocab_size):
            with pytest.raises(DataError, match=f"Token id {wrong} is outside"):
                mine.decode([0, wrong])


@pytest.mark.parametrize(
    "saved",
    [{}, {"name": 7}, {"name": "own"}, {"name": ["char"]}]
    + [{"name": "char", "alphabet": alphabet} for alphabet in (None, 5, [], ["ab", "c"], "", "a\ud800")],
)
def test_a_description_from_a_stranger_is_refused(saved):
    with pytest.raises(DataError):
        tokenizer_from_json(saved)


def test_gpt2_files_come_from_tiktokens_cache_first(nothing_at_hand, monkeypatch):
    for name in ("encoder.json", "vocab.bpe"):
        data = name.encode()
        monkeypatch.setitem(tokenizer._GPT2_SHA256, name, hashlib.sha256(data).hexdigest())
        key = hashlib.sha1(f"http://127.0.0.1:9/{name}".encode()).hexdigest()
        (nothing_at_hand / key).write_bytes(data)
    monkeypatch.setattr(tokenizer, "installed_files", lambda *_: [nothing_at_hand / "unused"])
    monkeypatch.setattr(tokenizer, "download", lambda *_: pytest.fail("it was in the cache"))
    assert gpt2_vocabulary_files() == {name: name.encode() for name in ("encoder.json", "vocab.bpe")}


def test_gpt2_files_come_from_the_installed_package_where_the_cache_is_empty(nothing_at_hand, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(nothing_at_hand))
    monkeypatch.setattr(tokenizer, "download", lambda *_: pytest.fail("it was installed"))
    for name, data in gpt2_vocabulary_files().items():
        assert hashlib.sha256(data).hexdigest() == tokenizer._GPT2_SHA256[name]


def test_without_files_or_network_it_fails_in_seconds_and_says_what_to_do(nothing_at_hand):
    began = time.monotonic()
    with pytest.raises(TokenizerError, match=r"pip install 'homebrew-gpt\[offline\]'"):
        get_tokenizer("gpt2")
    assert time.monotonic() - began < 5


def test_files_with_another_hash_are_not_used(nothing_at_hand, monkeypatch):
    damaged = nothing_at_hand / "encoder.json"
    damaged.write_bytes(b"{}")
    monkeypatch.setattr(tokenizer, "installed_files", lambda *_: [damaged])
    key = hashlib.sha1(b"http://127.0.0.1:9/encoder.json").hexdigest()
    (nothing_at_hand / key).write_bytes(b"{}")
    with pytest.raises(TokenizerError, match=r"encoder\.json"):
        gpt2_vocabulary_files()


def test_only_a_tokenizer_of_ours_is_a_datasets_tokenizer(theirs):
    for ours in (get_tokenizer("bytes"), get_tokenizer("char", text="ab")):
        assert dataset_tokenizer(SimpleNamespace(tokenizer=ours)) is ours
    for other in (theirs, "gpt2", None):
        assert dataset_tokenizer(SimpleNamespace(tokenizer=other)) is None
    assert dataset_tokenizer([]) is None
