import hashlib
import time
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Tokenizer as HuggingFaceTokenizer

from homebrew.data import gpt2_vocabulary
from homebrew.data import tokenizer as tokenizer_module
from homebrew.data.gpt2_vocabulary import GPT2_SHA256, gpt2_vocabulary_files
from homebrew.data.tokenizer import dataset_tokenizer, get_tokenizer, gpt2_byte_to_char, tokenizer_from_json
from homebrew.errors import DataError, TokenizerError

WORDS = st.text("aZ'sdtmrelv 0١½ \t\n\r\u00a0\u2028.,!é中😀\u0301\x00", max_size=40)
"""Characters for which GPT-2's rules for splitting words differ."""


@pytest.fixture(scope="module")
def hf_tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    for name, data in gpt2_vocabulary_files().items():
        (folder / name).write_bytes(data)
    return HuggingFaceTokenizer(vocab=str(folder / "encoder.json"), merges=str(folder / "vocab.bpe"))


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    """An empty tiktoken cache, without the installed package and the network."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(gpt2_vocabulary, "installed_files", lambda *_: [])
    monkeypatch.setattr(gpt2_vocabulary, "GPT2_URL", "http://127.0.0.1:9/")
    tokenizer_module._gpt2_encoding.cache_clear()
    yield tmp_path
    tokenizer_module._gpt2_encoding.cache_clear()


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=30) | WORDS)
def test_gpt2_matches_transformers_and_decodes(hf_tokenizer, text):
    gpt2 = get_tokenizer("gpt2")
    ids = gpt2.encode(text).tolist()
    assert ids == hf_tokenizer.encode(text, split_special_tokens=True)
    assert gpt2.decode(ids) == text


def test_gpt2_special_cases():
    gpt2 = get_tokenizer("gpt2")
    assert gpt2.encode("Hello, world!").tolist() == [15496, 11, 995, 0]
    assert gpt2.decode([gpt2.end_of_text_id]) == "<|endoftext|>"
    assert len(gpt2.encode("<|endoftext|>")) > 1, "an end of text in a text is ordinary text"
    assert sorted({bytes(gpt2.decode_bytes([i])) for i in range(256)}) == [bytes([i]) for i in range(256)]


@given(text=st.text(max_size=30))
def test_bytes_and_characters_decode(text):
    for tokenizer in (get_tokenizer("bytes"), get_tokenizer("char", text=text + "x")):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode_bytes(ids) == text.encode()
        assert tokenizer_from_json(tokenizer.to_json()).encode(text).tolist() == ids.tolist()
        assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_an_incomplete_character_decodes_to_the_replacement_character():
    assert get_tokenizer("bytes").decode(list("é".encode())[:1]) == "�"


def test_gpt2_byte_to_char_is_a_bijection_to_printable_characters():
    table = gpt2_byte_to_char()
    assert sorted(table) == list(range(256))
    assert len(set(table.values())) == 256
    assert all(char.isprintable() and char != " " for char in table.values())
    assert (table[ord("a")], table[ord(" ")], table[ord("\n")]) == ("a", "Ġ", "Ċ")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("gpt3", None, "Unknown tokenizer 'gpt3'"),
        ("char", None, "builds its alphabet"),
        ("char", "", "builds its alphabet"),
    ],
)
def test_get_tokenizer_rejects_invalid_arguments(name, text, message):
    with pytest.raises(DataError, match=message):
        get_tokenizer(name, text=text)


def test_unknown_characters_and_ids_raise():
    with pytest.raises(DataError, match="'c' is not in this tokenizer's alphabet of 2"):
        get_tokenizer("char", text="ab").encode("abc")
    for tokenizer in (get_tokenizer("bytes"), get_tokenizer("gpt2"), get_tokenizer("char", text="ab")):
        for invalid in (-1, tokenizer.vocab_size):
            with pytest.raises(DataError, match=f"Token id {invalid} is outside"):
                tokenizer.decode([0, invalid])


@pytest.mark.parametrize(
    "description",
    [{}, {"name": 7}, {"name": "own"}, {"name": ["char"]}]
    + [{"name": "char", "alphabet": alphabet} for alphabet in (None, 5, [], ["ab", "c"], "", "a\ud800")],
)
def test_tokenizer_from_json_rejects_other_descriptions(description):
    with pytest.raises(DataError):
        tokenizer_from_json(description)


def test_gpt2_files_are_read_from_tiktokens_cache_first(empty_cache, monkeypatch):
    for name in ("encoder.json", "vocab.bpe"):
        data = name.encode()
        monkeypatch.setitem(GPT2_SHA256, name, hashlib.sha256(data).hexdigest())
        key = hashlib.sha1(f"http://127.0.0.1:9/{name}".encode()).hexdigest()
        (empty_cache / key).write_bytes(data)
    monkeypatch.setattr(gpt2_vocabulary, "installed_files", lambda *_: [empty_cache / "unused"])
    monkeypatch.setattr(gpt2_vocabulary, "download", lambda *_: pytest.fail("downloaded a cached file"))
    assert gpt2_vocabulary_files() == {name: name.encode() for name in ("encoder.json", "vocab.bpe")}


def test_gpt2_files_are_read_from_the_installed_package_if_the_cache_is_empty(empty_cache, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(empty_cache))
    monkeypatch.setattr(gpt2_vocabulary, "download", lambda *_: pytest.fail("downloaded an installed file"))
    for name, data in gpt2_vocabulary_files().items():
        assert hashlib.sha256(data).hexdigest() == GPT2_SHA256[name]


def test_unavailable_gpt2_files_raise_within_seconds(empty_cache):
    start = time.monotonic()
    with pytest.raises(TokenizerError, match=r"pip install -e '\.\[offline\]'"):
        get_tokenizer("gpt2")
    assert time.monotonic() - start < 5


def test_gpt2_files_with_a_wrong_hash_are_ignored(empty_cache, monkeypatch):
    corrupt = empty_cache / "encoder.json"
    corrupt.write_bytes(b"{}")
    monkeypatch.setattr(gpt2_vocabulary, "installed_files", lambda *_: [corrupt])
    key = hashlib.sha1(b"http://127.0.0.1:9/encoder.json").hexdigest()
    (empty_cache / key).write_bytes(b"{}")
    with pytest.raises(TokenizerError, match=r"encoder\.json"):
        gpt2_vocabulary_files()


def test_dataset_tokenizer_ignores_tokenizers_of_other_libraries(hf_tokenizer):
    for own in (get_tokenizer("bytes"), get_tokenizer("char", text="ab")):
        assert dataset_tokenizer(SimpleNamespace(tokenizer=own)) is own
    for other in (hf_tokenizer, "gpt2", None):
        assert dataset_tokenizer(SimpleNamespace(tokenizer=other)) is None
    assert dataset_tokenizer([]) is None
