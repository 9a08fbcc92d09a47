"""gigatoken gives the same ids as tiktoken."""

import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from homebrew import get_tokenizer
from homebrew.data import fast_tokenizer as module
from homebrew.data.byte_pair_tokenizer import BytePairTokenizer
from homebrew.data.fast_tokenizer import FastEncoding, fast_tokenizer, has_fast_tokenizer
from homebrew.data.gpt2_vocabulary import END_OF_TEXT
from homebrew.data.tiktoken_tokenizer import gpt2_byte_to_char

BYTES = [*gpt2_byte_to_char().values()]
TOKENIZERS = {
    "gpt2": get_tokenizer("gpt2"),
    "end of text first": BytePairTokenizer([END_OF_TEXT, *BYTES, "Ġt", "he", "Ġthe", "<|"]),
    "end of text last": BytePairTokenizer([*BYTES, "aa", "aaa", "Ġaaa", END_OF_TEXT]),
}
FAST = {name: fast_tokenizer(tokenizer.to_json()) for name, tokenizer in TOKENIZERS.items()}
TEXTS = st.text(st.sampled_from("a'sthe —\n\r\t é,🙂1<|\0\x85\u3000"), max_size=60) | st.text(
    st.characters(codec="utf-8"), max_size=40
)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(texts=st.lists(TEXTS | st.just(END_OF_TEXT), min_size=1, max_size=5), marker=st.sampled_from(["", END_OF_TEXT]))
def test_ids_are_those_of_tiktoken(name, texts, marker):
    tokenizer, fast = TOKENIZERS[name], FAST[name]
    text = marker.join(texts)
    assert fast.encode(text).tolist() == tokenizer.encode(text).tolist()
    assert fast.decode_bytes(fast.encode(text)) == text.encode()
    expected = [i for text in texts for i in [tokenizer.end_of_text_id, *tokenizer.encode(text).tolist()]]
    assert fast.encode_documents(texts).tolist() == expected


@pytest.mark.parametrize("text", ["a", "ACGT", "中文没有空格", "0123456789", "!?", " ", "\n", "A text of one line. "])
def test_long_runs_have_the_ids_of_tiktoken(text):
    text = (text * 100_000)[:150_000]
    assert FAST["gpt2"].encode(text).tolist() == TOKENIZERS["gpt2"].encode(text).tolist()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_characters_of_new_versions_of_unicode_have_the_ids_of_tiktoken(name):
    tokenizer, fast = TOKENIZERS[name], FAST[name]
    new = "\U000323b0\u088f\u0c5c\ua7ce\U00010940\U00016ea0\U0001e6c0\U00011de0\u0378"
    for form in ["a{}b", "1{}2", "!{}!", " {}", "{0}'s{0}\n{0}", "中{}<|endoftext|>", "{}"]:
        for text in map(form.format, new):
            texts = ["To be", text, "or not", f"{text}{END_OF_TEXT}"]
            ids = [tokenizer.encode(each).tolist() for each in texts]
            assert [fast.encode(each).tolist() for each in texts] == ids
            documents = [i for each in ids for i in (tokenizer.end_of_text_id, *each)]
            assert fast.encode_documents(texts).tolist() == documents


def test_every_character_has_the_ids_of_tiktoken():
    tokenizer, fast = TOKENIZERS["gpt2"], FAST["gpt2"]
    # tiktoken encodes the new characters. The others are safe in any combination, so they are encoded at once.
    characters = [
        chr(code) for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)) not in ("Cn", "Cs")
    ]
    # In "a–1" the class of – decides whether it is a word with the letter, with the digit, or neither.
    text = "".join(f"a{character}b 1{character}2!{character}?" for character in characters if character != "\0")
    assert fast.encode_documents([text])[1:].tolist() == tokenizer.encode(text).tolist()


def test_a_tokenizer_without_end_of_text_or_of_another_kind_is_not_fast():
    for tokenizer in (BytePairTokenizer(BYTES), get_tokenizer("bytes"), get_tokenizer("char", text="To be")):
        assert not has_fast_tokenizer(tokenizer, ["To be"])


def test_the_ids_are_compared_with_those_of_tiktoken(monkeypatch):
    tokenizer = TOKENIZERS["gpt2"]
    assert has_fast_tokenizer(tokenizer, ["To be,", "", f"or{END_OF_TEXT}"])
    monkeypatch.setattr(FastEncoding, "encode_special", lambda *_: tokenizer.encode("To be"))
    with pytest.warns(UserWarning, match="gigatoken gives"):
        assert not has_fast_tokenizer(tokenizer, ["or not to be"])


def test_the_ids_of_new_characters_are_compared(monkeypatch):
    monkeypatch.setattr(module, "_has_unassigned", lambda text: False)
    assert has_fast_tokenizer(TOKENIZERS["gpt2"], ["To be"])
    monkeypatch.setattr(module, "_new_characters", lambda: "\u088f's")
    with pytest.warns(UserWarning, match="gigatoken gives"):
        assert not has_fast_tokenizer(TOKENIZERS["gpt2"], ["To be"])


def test_gigatoken_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    assert not has_fast_tokenizer(TOKENIZERS["gpt2"], ["To be"])


def test_the_tokenizer_is_built_again_when_its_cache_has_grown(monkeypatch):
    encoding = FAST["end of text last"]._fast
    built = []
    monkeypatch.setattr(FastEncoding, "_build", lambda self: built.append(self))
    monkeypatch.setattr(module, "_CHARACTERS_BETWEEN_CHECKS", 10)
    for memory in (0, 2**40):
        monkeypatch.setattr(module, "_memory", lambda memory=memory: memory)
        for _ in range(3):
            encoding.encode_special("To be")
    assert built == [encoding]
