import contextlib
import json
import shutil
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from homebrew import GPT, GPTConfig, bounded_readers, get_tokenizer, train_tokenizer
from homebrew.errors import ModelError
from homebrew.hub.load import load_model
from homebrew.hub.read_tokenizer import read_tokenizer
from homebrew.hub.tokenizer_files import HOMEBREW_FILE


@pytest.fixture
def folder(gpt2_export, tmp_path):
    """Copy of an export with GPT-2's tokenizer, without homebrew's own description of it."""
    shutil.copytree(gpt2_export, tmp_path / "export")
    (tmp_path / "export" / HOMEBREW_FILE).unlink()
    return tmp_path / "export"


@pytest.mark.parametrize(
    "tokenizer",
    [get_tokenizer("bytes"), get_tokenizer("char", text="Grüße —"), None],
    ids=lambda tokenizer: getattr(tokenizer, "name", "none"),
)
def test_exported_tokenizers_are_loaded_with_the_model(tmp_path, tokenizer):
    GPT(GPTConfig(block_size=8, vocab_size=256, n_layer=1, n_head=1, n_embd=4)).save_pretrained(tmp_path, tokenizer)
    _, loaded = load_model(tmp_path)
    assert (loaded and loaded.to_json()) == (tokenizer and tokenizer.to_json())


def test_an_exported_gpt2_tokenizer_is_loaded_with_the_model(gpt2_export):
    _, tokenizer = load_model(gpt2_export)
    assert tokenizer.name == "gpt2"


@pytest.mark.parametrize("saved_by", ["homebrew", "transformers"])
def test_gpt2_is_recognized_by_its_vocabulary_and_merges(folder, saved_by):
    if saved_by == "transformers":
        tokenizer = AutoTokenizer.from_pretrained(folder)
        for name in ("vocab.json", "merges.txt"):
            (folder / name).unlink()
        tokenizer.save_pretrained(folder)
        assert (folder / "tokenizer.json").exists()
    assert read_tokenizer(folder, vocab_size=50_257).name == "gpt2"
    assert read_tokenizer(folder, vocab_size=50_304).name == "gpt2"
    with pytest.raises(ModelError, match=r"50257 ids.*vocab_size is 50000"):
        read_tokenizer(folder, vocab_size=50_000)


@pytest.mark.parametrize("name", ["gpt2", "byte pairs", "char"])
def test_every_file_is_read_once(folder, tmp_path, monkeypatch, name):
    if name == "gpt2":
        AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    elif name == "byte pairs":
        (tmp_path / "text.txt").write_text("a text to train on, a text to train on")
        folder = tmp_path / "byte pairs"
        train_tokenizer(tmp_path / "text.txt", folder, vocab_size=260)
    else:
        folder = tmp_path / "char"
        model = GPT(GPTConfig(block_size=8, vocab_size=256, n_layer=1, n_head=1, n_embd=4))
        model.save_pretrained(folder, get_tokenizer("char", text="text"))
    read, open_file = [], bounded_readers.open_file
    monkeypatch.setattr(bounded_readers, "open_file", lambda path, error: read.append(path) or open_file(path, error))
    assert read_tokenizer(folder, vocab_size=60_000) is not None
    assert "tokenizer.json" in {path.name for path in read}
    assert len(read) == len(set(read))


def test_other_tokenizers_of_gpt2s_size_are_not_recognized(folder):
    path = folder / "vocab.json"
    vocabulary = json.loads(path.read_text(encoding="utf-8"))
    swapped = {"the": vocabulary["he"], "he": vocabulary["the"]}
    path.write_text(json.dumps(vocabulary | swapped), encoding="utf-8")
    assert read_tokenizer(folder, vocab_size=50_257) is None
    path.write_text(json.dumps(vocabulary), encoding="utf-8")
    assert read_tokenizer(folder, vocab_size=50_257) is not None
    merges = folder / "merges.txt"
    version, first, second, rest = merges.read_text(encoding="utf-8").split("\n", 3)
    merges.write_text("\n".join([version, second, first, rest]), encoding="utf-8")
    assert read_tokenizer(folder, vocab_size=50_257) is None
    merges.unlink()
    assert read_tokenizer(folder, vocab_size=50_257) is None


MERGES = [5, [[1, 2]], [None], ["a b", ["a", ["b"]]], [{"a": "b"}]]


@pytest.mark.parametrize(
    "model", [None, [], {"vocab": [["a", 0.5]]}, *({"vocab": {"a": 0}, "merges": merges} for merges in MERGES)]
)
def test_other_kinds_of_tokenizer_are_not_recognized(tmp_path, model):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model}))
    assert read_tokenizer(tmp_path, vocab_size=50_257) is None


@pytest.mark.parametrize("num_merges", [300_000, 800_000])
def test_a_large_vocabulary_is_not_recognized(tmp_path, bounded_memory, num_merges):
    """Such as Llama's, beside a GPT-2 that was trained with it."""
    GPT(GPTConfig(block_size=8, vocab_size=300, n_layer=1, n_head=1, n_embd=4)).save_pretrained(tmp_path)
    merges = ",".join(['["Ġtoken", "Ġtoken"]'] * num_merges)
    (tmp_path / "tokenizer.json").write_text(f'{{"model": {{"vocab": {{"a": 0}}, "merges": [{merges}]}}}}')
    with bounded_memory():
        assert load_model(tmp_path)[1] is None


def export(folder, tokenizer):
    GPT(GPTConfig(block_size=8, vocab_size=300, n_layer=1, n_head=1, n_embd=4)).save_pretrained(folder, tokenizer)


def train_new(folder):
    text = ["the cat sat on the mat " * 50] * 4
    AutoTokenizer.from_pretrained(folder).train_new_from_iterator(text, vocab_size=280).save_pretrained(folder)


def edit(folder, name, change):
    values = json.loads((folder / name).read_text(encoding="utf-8"))
    change(values)
    (folder / name).write_text(json.dumps(values), encoding="utf-8")


def permute(vocabulary):
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


def add_merge(folder):
    edit(folder, "vocab.json", lambda vocabulary: vocabulary.update(th=256))
    (folder / "merges.txt").write_text("#version: 0.2\nt h\n")


STALE = {
    "trained anew": ("bytes", train_new, "other tokens or merges.*'bytes'"),
    "merge added": ("bytes", add_merge, "other tokens or merges"),
    "vocab.json permuted": ("bytes", lambda folder: edit(folder, "vocab.json", permute), "other tokens or merges"),
    "merges missing": ("bytes", lambda folder: (folder / "merges.txt").unlink(), "other tokens or merges"),
    "no model": ("bytes", lambda folder: (folder / "tokenizer.json").write_text("{}"), "other tokens or merges"),
    "tokenizer.json permuted": (
        "char",
        lambda folder: edit(folder, "tokenizer.json", lambda t: permute(t["model"]["vocab"])),
        "other tokens or merges.*'char'",
    ),
    "large": ("char", lambda folder: (folder / "tokenizer.json").write_text(" " * 2**25), "other tokens or merges"),
    **{
        name: (
            "char",
            lambda folder, part=part, new=new: edit(folder, "tokenizer.json", lambda t: t[part].update(new)),
            name,
        )
        for name, part, new in [
            ("pre_tokenizer.pattern", "pre_tokenizer", {"pattern": {"Regex": r"\s"}}),
            ("pre_tokenizer.behavior", "pre_tokenizer", {"behavior": "Removed"}),
            ("pre_tokenizer.invert", "pre_tokenizer", {"invert": True}),
            ("model.unk_token", "model", {"unk_token": "a"}),
        ]
    },
}


@pytest.mark.parametrize("case", STALE)
def test_a_description_that_contradicts_the_tokenizers_files_is_refused(tmp_path, case):
    """transformers reads the files, so the description must not win over them."""
    name, change, message = STALE[case]
    export(tmp_path, get_tokenizer(name, text="abc \n"))
    change(tmp_path)
    with pytest.raises(ModelError, match=message):
        load_model(tmp_path)


def test_an_export_of_gpt2s_tokenizer_with_other_ids_is_refused(gpt2_export, tmp_path):
    folder = shutil.copytree(gpt2_export, tmp_path / "export")
    edit(folder, "vocab.json", permute)
    with pytest.raises(ModelError, match=r"other tokens or merges.*'gpt2'"):
        load_model(folder)


@pytest.mark.parametrize("saved", [{}, {"name": "other"}, {"name": ["bytes"], "tokens": ["a"]}])
def test_a_custom_tokenizers_description_is_none_with_a_warning(tmp_path, saved):
    export(tmp_path, get_tokenizer("bytes"))
    (tmp_path / HOMEBREW_FILE).write_text(json.dumps(saved))
    with pytest.warns(UserWarning, match="custom tokenizer"):
        assert load_model(tmp_path)[1] is None


@pytest.mark.parametrize("saved", [{"name": "bytes", "a": 1}, {"name": "char"}, {"name": "char", "alphabet": 5}])
def test_an_invalid_description_raises_a_model_error(tmp_path, saved):
    (tmp_path / HOMEBREW_FILE).write_text(json.dumps(saved))
    with pytest.raises(ModelError, match=HOMEBREW_FILE):
        read_tokenizer(tmp_path, vocab_size=50_257)


@pytest.mark.parametrize("name", ["merges.txt", "vocab.json", HOMEBREW_FILE])
@pytest.mark.parametrize("content", ["too large", b"\xff"])
def test_invalid_files_are_rejected_in_bounded_memory(tmp_path, bounded_memory, name, content):
    for other in ("merges.txt", "vocab.json"):
        (tmp_path / other).write_text("{}")
    with (tmp_path / name).open("wb") as file:
        file.truncate(700 * 2**20) if content == "too large" else file.write(content)
    with bounded_memory(), pytest.raises(ModelError, match=name):
        read_tokenizer(tmp_path, vocab_size=50_257)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=3), children, max_size=3),
    max_leaves=6,
)
MODELS = st.fixed_dictionaries({"vocab": st.just({"a": 0}) | JSON, "merges": st.lists(JSON, max_size=3) | JSON})


@settings(max_examples=50, deadline=None, database=None)
@given(MODELS, st.binary(max_size=20))
def test_arbitrary_tokenizer_files_are_rejected_or_not_recognized(tmp_path_factory, model, merges):
    folder = tmp_path_factory.mktemp("arbitrary")
    for name, content in (("tokenizer.json", {"model": model}), (HOMEBREW_FILE, model), ("vocab.json", model["vocab"])):
        (folder / "merges.txt").write_bytes(merges)
        (folder / name).write_text(json.dumps(content))
        with contextlib.suppress(ModelError), warnings.catch_warnings(action="ignore"):
            assert read_tokenizer(folder, vocab_size=50_257) is None
        (folder / name).unlink()
