import json
import os
import resource
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, pipeline

from homebrew.data.gpt2_vocabulary import gpt2_vocabulary_files
from homebrew.data.tokenizer import ByteTokenizer, CharTokenizer, get_tokenizer
from homebrew.errors import ConfigError, ModelError
from homebrew.generation.sampling import Sampling
from homebrew.hub import export
from homebrew.hub.load import load_model
from homebrew.hub.peft import save_adapter
from homebrew.model.gpt import GPT
from homebrew.model.gpt_config import GPTConfig
from homebrew.model.lora import LoRAConfig, LoRALinear, adapter_state_dict, add_lora


def tiny_gpt(vocab_size=8, n_embd=8) -> GPT:
    return GPT(GPTConfig(block_size=16, vocab_size=vocab_size, n_layer=1, n_head=2, n_embd=n_embd))


@torch.no_grad()
def randomize(model: GPT) -> GPT:
    """Give the weights and biases values that make logits differ clearly."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.normal_(0, 0.3, generator=generator)
    model.transformer.wte.weight[model.config.vocab_size :] = 0
    return model.eval()


def test_gpt2s_vocabulary_and_merges_are_those_of_openai(gpt2_export):
    files = gpt2_vocabulary_files()
    assert json.loads((gpt2_export / "vocab.json").read_bytes()) == json.loads(files["encoder.json"])
    assert (gpt2_export / "merges.txt").read_bytes().splitlines() == files["vocab.bpe"].splitlines()


def test_the_exported_gpt2_tokenizer_encodes_alike(gpt2_export):
    hf_tokenizer, tokenizer = AutoTokenizer.from_pretrained(gpt2_export), get_tokenizer("gpt2")

    @settings(max_examples=500, deadline=None)
    @given(st.text().filter(lambda text: "<|endoftext|>" not in text))  # a special token in transformers only
    def check(text):
        ids = hf_tokenizer(text)["input_ids"]
        assert ids == tokenizer.encode(text).tolist()
        assert hf_tokenizer.decode(ids) == tokenizer.decode(ids)

    check()
    assert hf_tokenizer("ROMEO:<|endoftext|>")["input_ids"] == [33676, 4720, 25, 50_256]
    assert (hf_tokenizer.eos_token_id, len(hf_tokenizer), hf_tokenizer.model_max_length) == (50_256, 50_257, 16)


def test_the_exported_byte_tokenizer_encodes_alike(tmp_path):
    tokenizer = ByteTokenizer()
    tiny_gpt(vocab_size=256).save_pretrained(tmp_path, tokenizer)
    hf_tokenizer = AutoTokenizer.from_pretrained(tmp_path)

    @settings(max_examples=200, deadline=None)
    @given(st.text())
    def check(text):
        ids = hf_tokenizer(text)["input_ids"]
        assert ids == tokenizer.encode(text).tolist()
        assert hf_tokenizer.decode(ids) == text

    check()


@pytest.mark.parametrize(
    ("alphabet", "text"),
    [
        ("\n !AZabz", "zab Z!\nA"),
        ("".join(map(chr, range(128))), "a\tb\0c"),
        ("\n\r !'.aeé\u0301—€😀", "a é e\u0301  €—😀 .\r\n'a\n"),
    ],
)
def test_the_exported_character_tokenizer_encodes_alike(tmp_path, alphabet, text):
    tokenizer = CharTokenizer(alphabet)
    tiny_gpt(tokenizer.vocab_size).save_pretrained(tmp_path, tokenizer)
    hf_tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = hf_tokenizer(text)["input_ids"]
    assert ids == tokenizer.encode(text).tolist()
    assert hf_tokenizer.decode(ids) == text
    assert len(hf_tokenizer) == tokenizer.vocab_size
    with pytest.raises(Exception, match="Missing"):
        hf_tokenizer("ß")
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.eos_token_id is None


def test_the_pipeline_generates_the_same_tokens(gpt2_export):
    generate = pipeline("text-generation", model=str(gpt2_export))
    (output,) = generate("ROMEO:", max_new_tokens=8, do_sample=False, return_tensors=True)
    model = GPT.from_pretrained(gpt2_export)
    assert (
        output["generated_token_ids"] == model.generate([[33676, 4720, 25]], 8, sampling=Sampling(temperature=0.0))[0]
    )


class NoMergeTokenizer(ByteTokenizer):
    """Tokenizer with a token of two characters that is not the merge of two tokens."""

    name, vocab_size, end_of_text_id = "no-merge", 3, None

    def decode_bytes(self, ids):
        return "".join(["a", "é", "ab"][i] for i in ids).encode()

    def to_json(self):
        return {}


class RepeatingTokenizer(NoMergeTokenizer):
    """Tokenizer with two ids for the same token."""

    def decode_bytes(self, ids):
        return b"".join([b"a", b"b", b"a"][i] for i in ids)


def test_tokens_with_equal_bytes_are_refused_by_name(tmp_path):
    with pytest.raises(ModelError, match=r"tokens 0 and 2 of the tokenizer 'no-merge' are both b'a'"):
        tiny_gpt().save_pretrained(tmp_path / "a", RepeatingTokenizer())


def test_unsupported_tokenizers_are_rejected(tmp_path):
    model = tiny_gpt(vocab_size=8)
    with pytest.raises(ModelError, match=r"Token 1 \('é'\)"):
        model.save_pretrained(tmp_path / "a", NoMergeTokenizer())
    with pytest.raises(ModelError, match=r"tokenizer has 9 ids.*vocab_size is 8"):
        model.save_pretrained(tmp_path / "b", CharTokenizer("abcdefghi"))
    assert not (tmp_path / "a").exists()


def test_stale_tokenizer_files_are_removed(tmp_path):
    model = tiny_gpt(vocab_size=256)
    model.save_pretrained(tmp_path, CharTokenizer("abc"))
    (tmp_path / "added_tokens.json").write_text('{"<pad>": 256}')
    (tmp_path / "README.md").touch()
    model.save_pretrained(tmp_path, ByteTokenizer())
    hf_tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert hf_tokenizer("cé")["input_ids"] == list("cé".encode())
    assert (tmp_path / "README.md").exists()
    assert not (tmp_path / "added_tokens.json").exists()
    model.save_pretrained(tmp_path)  # without a tokenizer, existing files are kept
    assert (tmp_path / "vocab.json").exists()


def test_an_export_over_an_earlier_one_equals_one_into_an_empty_folder(tmp_path):
    older = GPT2LMHeadModel(GPT2Config(n_positions=16, vocab_size=300, n_layer=2, n_head=2, n_embd=8))
    older.generation_config.eos_token_id = 7
    older.save_pretrained(tmp_path / "over", max_shard_size="5KB")
    assert len(list((tmp_path / "over").iterdir())) > 4  # config, generation_config, index and shards
    for name in ("tokenizer.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"):
        (tmp_path / "over" / name).write_text("{}")
    (tmp_path / "over" / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "over" / "notes.txt").touch()
    model = randomize(tiny_gpt(vocab_size=256))
    for folder in ("over", "empty"):
        model.save_pretrained(tmp_path / folder, ByteTokenizer())
    names = {folder: {path.name for path in (tmp_path / folder).iterdir()} for folder in ("over", "empty")}
    assert names["over"] == names["empty"] | {"notes.txt"}
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "over")
    assert exported.generation_config.eos_token_id is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_transformers_loads_an_export(tmp_path, dtype):
    model = randomize(tiny_gpt(vocab_size=70, n_embd=16)).to(dtype)
    model.save_pretrained(tmp_path)
    hf_model, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    assert not any(info.values())
    assert type(hf_model) is GPT2LMHeadModel
    assert hf_model.config.vocab_size == 70
    assert hf_model.transformer.wte.weight.shape == (70, 16)
    if dtype == torch.float32:
        ids = torch.arange(16)[None]
        torch.testing.assert_close(model(ids), hf_model(ids).logits, atol=1e-4, rtol=1e-4)
    reloaded = GPT.from_pretrained(tmp_path, dtype=dtype)
    assert reloaded.config == model.config
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in reloaded.state_dict().items())


def test_files_are_replaced_atomically_with_default_permissions(tmp_path):
    tiny_gpt(n_embd=4).save_pretrained(tmp_path)
    old = (tmp_path / "model.safetensors").read_bytes()
    os.umask(umask := os.umask(0o022))
    tiny_gpt().save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() != old
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("file", "is_adapter", "description"),
    [
        ("manifest.json", False, "a checkpoint"),
        ("manifest.json", True, "a checkpoint"),
        ("run.json", False, "a run"),
        ("run.json", True, "a run"),
        ("adapter_config.json", False, "an adapter"),
        ("config.json", True, "a model"),
    ],
)
def test_folders_with_other_content_are_not_overwritten(tmp_path, file, is_adapter, description):
    (tmp_path / file).write_text("{}")
    model = tiny_gpt()
    if is_adapter:
        add_lora(model, LoRAConfig(rank=2))
    with pytest.raises(ModelError, match=rf"contains {description} \({file}\)\. Choose another folder"):
        save_adapter(model, tmp_path) if is_adapter else model.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [file]


@pytest.mark.parametrize(
    ("file", "content"),
    [("vocab.json", "{}"), ("model.safetensors", ""), ("config.json", '{"model_type": "llama"}')],
)
def test_files_of_others_are_not_replaced(tmp_path, file, content):
    (tmp_path / file).write_text(content)
    with pytest.raises(ModelError, match=rf"{file} would be replaced.*Choose another folder"):
        tiny_gpt(vocab_size=256).save_pretrained(tmp_path, get_tokenizer("bytes"))
    assert [path.name for path in tmp_path.iterdir()] == [file]
    assert (tmp_path / file).read_text() == content


def test_a_tokenizer_that_is_kept_does_not_prevent_an_export(tmp_path):
    (tmp_path / "vocab.json").write_text("{}")
    tiny_gpt().save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", "vocab.json"}


def test_a_full_disk_raises_a_model_error(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    model = tiny_gpt(n_embd=64)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(ModelError, match="Cannot write to"):
            model.save_pretrained(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_a_file_raises_a_model_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match="Cannot write to"):
        tiny_gpt().save_pretrained(tmp_path / "file")


def test_non_finite_weights_are_not_exported(tmp_path):
    model = tiny_gpt()
    with torch.no_grad():
        model.transformer.ln_f.bias[3] = torch.nan
    with pytest.raises(ModelError, match=r"transformer.ln_f.bias.*not finite"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def untie(model):
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 1)


def overflow(model):
    model.transformer.ln_f.weight.data.fill_(3e38)
    model.transformer.wte.weight.data.fill_(3e38)


def change_epsilon(model):
    model.transformer.ln_f.eps = 10.0


@pytest.mark.parametrize(
    ("change", "message"),
    [(untie, "lm_head.*wte.*tied"), (overflow, "logits are not finite"), (change_epsilon, "such as an epsilon")],
)
def test_a_changed_model_is_not_blamed_on_the_disk(tmp_path, change, message):
    model = randomize(tiny_gpt())
    change(model)
    with pytest.raises(ModelError, match=message):
        model.save_pretrained(tmp_path)


def test_verification_finds_changed_weights(tmp_path, monkeypatch):
    def save_changed(tensors: dict, path: Path, metadata: dict) -> None:
        name = "transformer.ln_f.bias"
        save_file(tensors | {name: tensors[name] + 1e-3}, path, metadata)

    monkeypatch.setattr(export, "save_file", save_changed)
    with pytest.raises(ModelError, match=r"transformer.ln_f.bias.*does not read back"):
        tiny_gpt().save_pretrained(tmp_path)


def test_verification_finds_a_changed_config(tmp_path):
    model = tiny_gpt()
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"n_head": 4}))
    with pytest.raises(ModelError, match=r"config\.json reads back as .*n_head=4"):
        export.verify_export(tmp_path, model, GPT.from_pretrained(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_verification_finds_different_logits(tmp_path, monkeypatch, dtype):
    model = randomize(tiny_gpt(vocab_size=70, n_embd=16)).to(dtype).train()
    add_lora(model, LoRAConfig(rank=2))
    with torch.no_grad():
        for tensor in adapter_state_dict(model).values():
            tensor.normal_(std=0.3)
    model.save_pretrained(tmp_path)
    assert model.training
    monkeypatch.setattr(LoRALinear, "forward", torch.nn.Linear.forward)  # the adapter is merged but not computed
    with pytest.raises(ModelError, match="different logits"):
        model.save_pretrained(tmp_path)


def test_an_export_with_a_tokenizer_keeps_the_models_own_end_of_text(tmp_path):
    config = GPTConfig(block_size=16, vocab_size=256, n_layer=1, n_head=2, n_embd=8, eos_token_id=10)
    GPT(config).save_pretrained(tmp_path, ByteTokenizer())
    assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id == 10


def test_an_empty_path_is_not_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny_gpt()
    add_lora(model, LoRAConfig(2))
    for write in (lambda: model.save_pretrained(""), lambda: save_adapter(model, ""), lambda: load_model("")):
        with pytest.raises(ConfigError, match="empty string"):
            write()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("lora", [False, True])
def test_a_model_without_weights_is_not_exported(tmp_path, lora):
    model = tiny_gpt()
    if lora:
        add_lora(model, LoRAConfig(rank=2))
    with pytest.raises(ModelError, match="meta device"):
        model.to("meta").save_pretrained(tmp_path / "export")
    assert not (tmp_path / "export").exists()
