"""Opening a `tokenizer.json`: what is supported, and what is refused."""

import json
import pickle
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from homebrew import get_tokenizer
from homebrew.data import tiktoken_tokenizer
from homebrew.data.byte_pair_tokenizer import BytePairTokenizer
from homebrew.data.tiktoken_tokenizer import gpt2_byte_to_char
from homebrew.data.tokenizer import tokenizer_from_json
from homebrew.errors import DataError

TEXT = "the cat sat on the mat, and the other cat's hat;  \n\n\tGrüße für die Größen 中文中文 😀😀 1234 12345\n" * 20
WORDS = st.text("athecs'd \t\n\r\u00a0.,!éü中文😀\u0301\x00 12", max_size=60)
"""Characters that are merged, and those that GPT-2's rules for splitting words treat differently."""


def train(vocab_size=400, special=("<|endoftext|>",), alphabet=True, text=TEXT, prefix_space=False):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    initial = pre_tokenizers.ByteLevel.alphabet() if alphabet else []
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(special), initial_alphabet=initial, show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


@pytest.fixture(scope="module")
def reference():
    return train()


@pytest.fixture(scope="module")
def path(reference, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    reference.save(str(path))
    return path


@settings(max_examples=200)
@given(text=st.text(max_size=40) | WORDS)
def test_ids_are_those_of_the_tokenizers_library(reference, path, text):
    tokenizer = get_tokenizer(path)
    ids = tokenizer.encode(text)
    assert ids.tolist() == reference.encode(text).ids
    assert tokenizer.decode(ids) == text
    again = tokenizer_from_json(json.loads(json.dumps(tokenizer.to_json())))
    assert again.encode(text).tolist() == ids.tolist()


@given(data=st.binary(max_size=40))
def test_any_bytes_can_be_decoded(path, data):
    tokenizer = get_tokenizer(path)
    byte_ids = {tokenizer.decode_bytes([i]): i for i in range(tokenizer.vocab_size)}
    assert tokenizer.decode_bytes([byte_ids[bytes([byte])] for byte in data]) == data
    text = data.decode(errors="replace")
    assert tokenizer.decode_bytes(tokenizer.encode(text)) == text.encode()


@settings(max_examples=20)
@given(text=st.text("ab", min_size=300, max_size=2000) | st.text("aAbc 中'1\n", min_size=300, max_size=2000))
def test_encoding_in_chunks_gives_the_ids_of_the_entire_text(reference, path, text):
    chunks = (text[i : i + 100] for i in range(0, len(text), 100))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiktoken_tokenizer, "_NUM_HELD_BACK", 40)
        ids = np.concatenate([*get_tokenizer(path).encode_chunks(chunks)])
    assert ids.tolist() == reference.encode(text).ids


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("alphabet", ["ab", "abc", "aé中 '", "01 \n"])
def test_any_trained_byte_level_bpe_is_supported(alphabet, seed, tmp_path):
    """Also on repetitive texts, where several pairs could make one token."""
    random = Random(seed)
    reference = train(300 + 100 * seed, text="".join(random.choices(alphabet, k=3000)))
    reference.save(str(tmp_path / "tokenizer.json"))
    text = "".join(random.choices(alphabet, k=500))
    assert get_tokenizer(tmp_path).encode(text).tolist() == reference.encode(text).ids


@pytest.mark.parametrize("seed", range(30))
def test_merges_that_no_training_makes_are_refused_or_give_equal_ids(seed, tmp_path):
    random = Random(seed)
    alphabet = "ab" if seed % 2 else "abc"
    tokens, merges = list(alphabet), []
    for _ in range(random.randint(1, 12)):
        pair = random.choice(tokens), random.choice(tokens)
        if "".join(pair) not in tokens:
            tokens.append("".join(pair))
            merges.append(pair)
    byte_tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*byte_tokens, *tokens[len(alphabet) :]])}
    reference = Tokenizer(models.BPE(vocabulary, merges))
    reference.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    reference.decoder = decoders.ByteLevel()
    reference.save(str(tmp_path / "tokenizer.json"))
    try:
        tokenizer = get_tokenizer(tmp_path)
    except DataError:
        return
    for _ in range(200):
        text = "".join(random.choices(alphabet, k=random.randint(1, 30)))
        assert tokenizer.encode(text).tolist() == reference.encode(text).ids


def test_a_folder_a_string_and_a_link_are_opened(path, tmp_path):
    description = get_tokenizer(path).to_json()
    (tmp_path / "tokenizer.json").symlink_to(path)
    for name in (str(path), path.parent, tmp_path, tmp_path / "tokenizer.json"):
        assert get_tokenizer(name).to_json() == description


def test_end_of_text_is_ordinary_text_in_a_text(path):
    tokenizer = get_tokenizer(path)
    assert tokenizer.end_of_text_id == 0
    assert 0 not in tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.decode([0]) == "<|endoftext|>"


def test_end_of_text_may_be_missing_or_added_after_training(tmp_path):
    tokenizer = train(special=())
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert get_tokenizer(tmp_path).end_of_text_id is None
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    opened = get_tokenizer(tmp_path)
    assert opened.end_of_text_id == opened.vocab_size - 1 == tokenizer.token_to_id("<|endoftext|>")


def change(**parts):
    tokenizer = train()
    for name, value in parts.items():
        setattr(tokenizer, name, value)
    return tokenizer


def add(*tokens):
    tokenizer = train()
    tokenizer.add_special_tokens(list(tokens))
    return tokenizer


def trained(model, trainer):
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


OTHERS = {
    "WordPiece": lambda: trained(models.WordPiece(), trainers.WordPieceTrainer(show_progress=False)),
    "Unigram": lambda: trained(models.Unigram(), trainers.UnigramTrainer(show_progress=False)),
    "WordLevel": lambda: trained(models.WordLevel(), trainers.WordLevelTrainer(show_progress=False)),
    "Whitespace": lambda: trained(models.BPE(), trainers.BpeTrainer(show_progress=False)),
    "Metaspace": lambda: change(pre_tokenizer=pre_tokenizers.Metaspace(), decoder=decoders.Metaspace()),
    "Sequence": lambda: change(
        pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel()])
    ),
    "add_prefix_space": lambda: train(prefix_space=True),
    "use_regex": lambda: change(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
    "NFC": lambda: change(normalizer=normalizers.NFC()),
    "Lowercase": lambda: change(normalizer=normalizers.Lowercase()),
    "post_processor": lambda: change(
        post_processor=processors.TemplateProcessing("<|endoftext|> $0", special_tokens=[("<|endoftext|>", 0)])
    ),
    "[PAD]": lambda: add("[PAD]"),
    "<s>": lambda: train(special=["<s>", "<|endoftext|>"]),
    "256 bytes": lambda: train(alphabet=False),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_tokenizers_are_refused_by_name(name, tmp_path):
    OTHERS[name]().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError) as caught:
        get_tokenizer(tmp_path)
    assert name in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def swap_ids(model):
    vocabulary = model["vocab"]
    a, b = list(vocabulary)[-2:]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]


CHANGES = {
    "no model": lambda values: values.pop("model"),
    "model of another type": lambda values: values.update(model=[1]),
    "vocab of another type": lambda values: values["model"].update(vocab=[["a", 0]]),
    "merges of another type": lambda values: values["model"].update(merges=[5]),
    "merges missing": lambda values: values["model"].pop("merges"),
    "a merge missing": lambda values: values["model"]["merges"].pop(),
    "merges reversed": lambda values: values["model"]["merges"].reverse(),
    "merge of other tokens": lambda values: values["model"]["merges"].__setitem__(-1, ["a", "b"]),
    "ids swapped": lambda values: swap_ids(values["model"]),
    "id twice": lambda values: values["model"]["vocab"].update(a=5),
    "id missing": lambda values: values["model"]["vocab"].popitem(),
    "id beyond the end": lambda values: values["model"]["vocab"].update(a=10**9),
    "id of another type": lambda values: values["model"]["vocab"].update(a="5"),
    "id is a boolean": lambda values: values["model"]["vocab"].update({'"': True}),
    "id negative": lambda values: values["model"]["vocab"].update(a=-1),
    "empty token": lambda values: values["model"]["vocab"].update({"": len(values["model"]["vocab"])}),
    "token not in bytes": lambda values: values["model"]["vocab"].update({"中": len(values["model"]["vocab"])}),
    "long token": lambda values: values["model"]["vocab"].update({"a" * 10**6: len(values["model"]["vocab"])}),
    "added tokens of another type": lambda values: values.update(added_tokens=7),
    "added token of another type": lambda values: values.update(added_tokens=[None]),
    "added token with another id": lambda values: values["added_tokens"][0].update(id=3),
    "byte fallback": lambda values: values["model"].update(byte_fallback=True),
    "dropout": lambda values: values["model"].update(dropout=0.1),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_files_are_errors(name, path, tmp_path):
    values = json.loads(path.read_text(encoding="utf-8"))
    CHANGES[name](values)
    (tmp_path / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        get_tokenizer(tmp_path)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 10**5, b'{"a": 1, "a": 2}', b"\x00" * 2**25])
def test_files_that_are_not_json_are_errors(data, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(data)
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        get_tokenizer(tmp_path)


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("unpickled"),)


@pytest.mark.parametrize("name", ["meta.pkl", "data.pickle", "tokenizer.json", "."])
@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_nanogpts_pickle_is_not_read(name, protocol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / (name if name != "." else "meta.pkl")).write_bytes(pickle.dumps({"stoi": Bomb()}, protocol))
    with pytest.raises(DataError, match=r"'char'.*text"):
        get_tokenizer(f"./{name}")
    assert not (tmp_path / "unpickled").exists()


def test_missing_and_unusable_paths_are_errors(tmp_path):
    for name in ("gtp2", "", tmp_path / "missing.json", tmp_path, 5, None):
        with pytest.raises(DataError):
            get_tokenizer(name)


@pytest.mark.parametrize("tokens", [None, [], "abc", [1, 2], ["a", "a"], ["a"] * 257])
def test_other_descriptions_are_errors(tokens):
    with pytest.raises(DataError):
        tokenizer_from_json({"name": "bpe", "tokens": tokens})


def test_a_vocabulary_too_long_for_a_checkpoint_is_an_error():
    tokens = [*gpt2_byte_to_char().values(), *(f"{i:0128d}" for i in range(2**14))]
    with pytest.raises(DataError, match="smaller vocabulary"):
        BytePairTokenizer(tokens)
