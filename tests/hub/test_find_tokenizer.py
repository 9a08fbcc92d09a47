"""Which tokenizer a model in transformers' format has."""

import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from homebrew import GPT, GPTConfig, get_tokenizer
from homebrew.errors import ModelError
from homebrew.hub.find_tokenizer import find_tokenizer
from homebrew.hub.load import load_model
from homebrew.hub.tokenizer_files import OUR_FILE


def exported(folder: Path, tokenizer, vocab_size=50_257) -> Path:
    model = GPT(GPTConfig(block_size=8, vocab_size=vocab_size, n_layer=1, n_head=1, n_embd=4))
    model.save_pretrained(folder, tokenizer)
    return folder


@pytest.mark.parametrize(
    "tokenizer",
    [get_tokenizer("gpt2"), get_tokenizer("bytes"), get_tokenizer("char", text="Grüße —"), None],
    ids=lambda tokenizer: getattr(tokenizer, "name", "none"),
)
def test_what_we_exported_is_opened_with_its_tokenizer(tmp_path, tokenizer):
    _, found = load_model(exported(tmp_path, tokenizer))
    assert (found and found.to_json()) == (tokenizer and tokenizer.to_json())


@pytest.mark.parametrize("by", ["us", "transformers"])
def test_gpt2s_is_known_by_its_vocabulary_and_merges(tmp_path, by):
    exported(tmp_path, get_tokenizer("gpt2"))
    (tmp_path / OUR_FILE).unlink()
    if by == "transformers":
        theirs = AutoTokenizer.from_pretrained(tmp_path)
        for name in ("vocab.json", "merges.txt"):
            (tmp_path / name).unlink()
        theirs.save_pretrained(tmp_path)
        assert (tmp_path / "tokenizer.json").exists()
    assert find_tokenizer(tmp_path, vocab_size=50_257).name == "gpt2"
    assert find_tokenizer(tmp_path, vocab_size=50_304).name == "gpt2"
    with pytest.raises(ModelError, match=r"50257 ids.*vocab_size is 50000"):
        find_tokenizer(tmp_path, vocab_size=50_000)


def test_another_tokenizer_of_gpt2s_size_is_not_taken_for_it(tmp_path):
    exported(tmp_path, get_tokenizer("gpt2"))
    (tmp_path / OUR_FILE).unlink()
    path = tmp_path / "vocab.json"
    right = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(right | {"the": right["he"], "he": right["the"]}), encoding="utf-8")
    assert find_tokenizer(tmp_path, vocab_size=50_257) is None
    path.write_text(json.dumps(right), encoding="utf-8")
    assert find_tokenizer(tmp_path, vocab_size=50_257) is not None
    merges = tmp_path / "merges.txt"
    first, second, third, rest = merges.read_text(encoding="utf-8").split("\n", 3)
    merges.write_text("\n".join([first, third, second, rest]), encoding="utf-8")
    assert find_tokenizer(tmp_path, vocab_size=50_257) is None
    merges.unlink()
    assert find_tokenizer(tmp_path, vocab_size=50_257) is None


MERGES = [5, [[1, 2]], [None], ["a b", ["a", ["b"]]], [{"a": "b"}]]


@pytest.mark.parametrize(
    "model", [None, [], {"vocab": [["a", 0.5]]}, *({"vocab": {"a": 0}, "merges": merges} for merges in MERGES)]
)
def test_other_kinds_of_tokenizer_are_not_known(tmp_path, model):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model}))
    assert find_tokenizer(tmp_path, vocab_size=50_257) is None


@pytest.mark.parametrize("saved", [{}, {"name": "other"}, {"name": "char"}, {"name": "char", "alphabet": 5}])
def test_a_damaged_description_is_an_error(tmp_path, saved):
    (tmp_path / OUR_FILE).write_text(json.dumps(saved))
    with pytest.raises(ModelError, match=OUR_FILE):
        find_tokenizer(tmp_path, vocab_size=50_257)


@pytest.mark.parametrize("name", ["merges.txt", "vocab.json", "tokenizer.json", OUR_FILE])
@pytest.mark.parametrize("content", ["long", b"\xff"])
def test_a_file_that_is_no_description_is_refused_in_bounded_memory(tmp_path, bounded_memory, name, content):
    for other in ("merges.txt", "vocab.json"):
        (tmp_path / other).write_text("{}")
    with (tmp_path / name).open("wb") as file:
        file.truncate(700 * 2**20) if content == "long" else file.write(content)
    with bounded_memory(), pytest.raises(ModelError, match=name):
        find_tokenizer(tmp_path, vocab_size=50_257)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=3), children, max_size=3),
    max_leaves=6,
)
MODELS = st.fixed_dictionaries({"vocab": st.just({"a": 0}) | JSON, "merges": st.lists(JSON, max_size=3) | JSON})


@settings(max_examples=200, deadline=None, database=None)
@given(MODELS, st.binary(max_size=20))
def test_any_tokenizer(tmp_path_factory, model, merges):
    folder = tmp_path_factory.mktemp("any")
    for name, content in (("tokenizer.json", {"model": model}), (OUR_FILE, model), ("vocab.json", model["vocab"])):
        (folder / "merges.txt").write_bytes(merges)
        (folder / name).write_text(json.dumps(content))
        with contextlib.suppress(ModelError):
            assert find_tokenizer(folder, vocab_size=50_257) is None
        (folder / name).unlink()
