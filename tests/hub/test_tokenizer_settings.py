"""Settings beside the vocabulary and the merges: what is not GPT-2's is refused by name."""

import contextlib
import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from homebrew import GPT, GPTConfig, get_tokenizer
from homebrew.data.gpt2_vocabulary import END_OF_TEXT
from homebrew.errors import ModelError
from homebrew.hub.load import load_model
from homebrew.hub.read_tokenizer import read_tokenizer
from homebrew.hub.tokenizer_files import HOMEBREW_FILE
from homebrew.hub.tokenizer_settings import unsupported_settings

TEXT = "Hello  World 's [PAD] <|im_start|>user ﬁ 1234\n\n x"


@pytest.fixture(scope="module")
def saved_by_transformers(gpt2_export, tmp_path_factory):
    """Export whose tokenizer was opened and saved by transformers, which writes `tokenizer.json`."""
    folder = tmp_path_factory.mktemp("saved") / "export"
    shutil.copytree(gpt2_export, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for name in ("vocab.json", "merges.txt", HOMEBREW_FILE):
        (folder / name).unlink()
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved_by_transformers, tmp_path):
    return shutil.copytree(saved_by_transformers, tmp_path / "export")


def edit(folder, name, **fields):
    path = folder / name
    values = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps(values | fields), encoding="utf-8")


PIPELINES = {
    "normalizer": lambda t: setattr(t, "normalizer", normalizers.NFKC()),
    "normalizer=.*Sequence": lambda t: setattr(t, "normalizer", normalizers.Sequence([normalizers.Lowercase()])),
    "pre_tokenizer.type='Whitespace'": lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Whitespace()),
    "pre_tokenizer.type='Sequence'": lambda t: setattr(
        t, "pre_tokenizer", pre_tokenizers.Sequence([pre_tokenizers.Digits(True), t.pre_tokenizer])
    ),
    "pre_tokenizer.type=None": lambda t: setattr(t, "pre_tokenizer", None),
    "pre_tokenizer.add_prefix_space=True": lambda t: setattr(t.pre_tokenizer, "add_prefix_space", True),
    "pre_tokenizer.use_regex=False": lambda t: setattr(t.pre_tokenizer, "use_regex", False),
    "post_processor=.*TemplateProcessing": lambda t: setattr(
        t, "post_processor", processors.TemplateProcessing(f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, 50_256)])
    ),
    "post_processor=.*RobertaProcessing": lambda t: setattr(
        t, "post_processor", processors.RobertaProcessing((END_OF_TEXT, 50_256), (END_OF_TEXT, 50_256))
    ),
    r"added token='\[PAD\]' with id 50257": lambda t: t.add_special_tokens(["[PAD]"]),
    r"added token='World' with id 10603": lambda t: t.add_tokens(["World"]),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_another_pipeline_is_refused_by_name(folder, name):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    PIPELINES[name](tokenizer)
    tokenizer.save(str(folder / "tokenizer.json"))
    assert tokenizer.encode(TEXT).ids != get_tokenizer("gpt2").encode(TEXT).tolist()
    with pytest.raises(ModelError, match=name):
        read_tokenizer(folder, vocab_size=50_300)


CONFIGS = [
    {"add_prefix_space": True},
    {"add_bos_token": True},
    {"add_eos_token": True},
    {"pad_token": "[PAD]"},
    {"pad_token": {"__type": "AddedToken", "content": "l", "special": True}},
    {"image_token": "<|im_start|>"},
    {"extra_special_tokens": ["<|im_start|>"]},
    {"extra_special_tokens": {"start_token": "<|im_start|>"}},
    {"additional_special_tokens": ["<|im_start|>"]},
    {"added_tokens_decoder": {"50257": {"content": "<|im_start|>", "special": True}}},
]


@pytest.mark.parametrize("fields", CONFIGS, ids=str)
def test_another_configuration_is_refused_by_name(gpt2_export, tmp_path, fields):
    folder = shutil.copytree(gpt2_export, tmp_path / "export")
    edit(folder, "tokenizer_config.json", **fields)
    assert AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"] != get_tokenizer("gpt2").encode(TEXT).tolist()
    name = "added token" if "added_tokens_decoder" in fields else next(iter(fields))
    with pytest.raises(ModelError, match=name):
        read_tokenizer(folder, vocab_size=50_300)


@pytest.mark.parametrize(
    ("file", "fields", "name"),
    [
        ("special_tokens_map.json", {"pad_token": {"content": "<pad>"}}, "pad_token='<pad>'"),
        ("added_tokens.json", {"<|im_end|>": 50_257}, "added token='<|im_end|>' with id 50257"),
        ("added_tokens.json", {END_OF_TEXT: 50_260}, "with id 50260"),
        ("tokenizer_config.json", {"tokenizer_class": "MyTokenizer"}, "tokenizer_class='MyTokenizer'"),
    ],
)
@pytest.mark.parametrize("exported", [True, False])
def test_files_of_older_transformers_are_checked(gpt2_export, tmp_path, file, fields, name, exported):
    folder = shutil.copytree(gpt2_export, tmp_path / "export")
    edit(folder, file, **fields)
    if not exported:
        (folder / HOMEBREW_FILE).unlink()
    with pytest.raises(ModelError) as error:
        load_model(folder)
    assert name in str(error.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"pad_token": END_OF_TEXT, "add_bos_token": False, "errors": "replace", "model_max_length": 1024},
        {"bos_token": {"__type": "AddedToken", "content": END_OF_TEXT}, "tokenizer_class": "GPT2TokenizerFast"},
        {"added_tokens_decoder": {"50256": {"content": END_OF_TEXT, "special": True}}, "chat_template": None},
    ],
)
def test_settings_with_the_same_ids_are_gpt2(folder, fields):
    edit(folder, "tokenizer_config.json", **fields)
    ids = AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]
    assert read_tokenizer(folder, vocab_size=50_257).encode(TEXT).tolist() == ids


def test_the_files_of_openais_gpt2_are_gpt2(folder):
    """Its `tokenizer.json` is older than several fields, and its ByteLevel post-processor changes only offsets."""
    pipeline = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    for name in ("type", "byte_fallback", "ignore_merges"):
        del pipeline["model"][name]
    del pipeline["pre_tokenizer"]["use_regex"]
    pipeline["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}
    pipeline["model"]["merges"] = [" ".join(pair) for pair in pipeline["model"]["merges"]]
    (folder / "tokenizer.json").write_text(json.dumps(pipeline), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 1024}')
    assert read_tokenizer(folder, vocab_size=50_257).name == "gpt2"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda children: (
        st.lists(children, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "content", "id", "single", "Sequence"]), children, max_size=3)
    ),
    max_leaves=6,
)
FIELDS = ["added_tokens_decoder", "pad_token", "extra_special_tokens", "add_prefix_space", "tokenizer_class"]


@settings(max_examples=30, deadline=None, database=None)
@given(
    config=st.dictionaries(st.sampled_from(FIELDS), JSON),
    special=st.dictionaries(st.sampled_from(FIELDS), JSON),
    pipeline=st.dictionaries(st.sampled_from(["normalizer", "pre_tokenizer", "post_processor", "added_tokens"]), JSON),
)
def test_arbitrary_settings_are_refused_or_supported(tmp_path_factory, config, special, pipeline):
    folder = tmp_path_factory.mktemp("arbitrary")
    for name, values in (("tokenizer_config", config), ("special_tokens_map", special)):
        (folder / f"{name}.json").write_text(json.dumps(values))
    with contextlib.suppress(ModelError):
        assert all(
            isinstance(setting, str) for setting in unsupported_settings(folder, get_tokenizer("gpt2"), pipeline)
        )


@pytest.mark.parametrize("name", ["bytes", "char"])
def test_exports_saved_again_by_transformers_are_checked(tmp_path, name):
    tokenizer = get_tokenizer(name, text="abc \n")
    GPT(GPTConfig(block_size=8, vocab_size=300, n_layer=1, n_head=1, n_embd=4)).save_pretrained(tmp_path, tokenizer)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    saved.save_pretrained(tmp_path)
    assert read_tokenizer(tmp_path, vocab_size=300).to_json() == tokenizer.to_json()
    saved.add_special_tokens({"eos_token": END_OF_TEXT})
    saved.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"eos_token='<\|endoftext\|>'.*added token"):
        read_tokenizer(tmp_path, vocab_size=300)
