import json
import struct
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, GPT2Model

from homebrew import bounded_readers
from homebrew.data.tokenizer import ByteTokenizer
from homebrew.errors import ConfigError, HomebrewError, ModelError
from homebrew.hub import hf_config
from homebrew.model.gpt import GPT
from homebrew.model.gpt_config import GPTConfig

SIZES = {"n_positions": 12, "vocab_size": 70, "n_layer": 2, "n_head": 2, "n_embd": 16, "initializer_range": 0.3}


def hf_gpt2(**sizes) -> GPT2LMHeadModel:
    """Small GPT-2 of transformers with random weights and biases."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**{**SIZES, **sizes}, bos_token_id=0, eos_token_id=0))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # transformers initializes biases to zero, which would hide an ignored bias
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def assert_same_logits(model: GPT, hf_model: torch.nn.Module) -> None:
    config = model.config
    ids = torch.randint(config.vocab_size, (2, config.block_size), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = hf_model(ids).logits
        torch.testing.assert_close(model.eval()(ids), expected, atol=1e-4, rtol=1e-4)
    assert expected.std() > 0.1


@pytest.fixture
def folder(tmp_path) -> Path:
    """Folder written by transformers."""
    hf_gpt2().save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, edit) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file({name: t.contiguous() for name, t in edit(tensors).items()}, path)


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"n_layer": 1, "n_head": 1, "n_embd": 5, "vocab_size": 11},
        {"n_layer": 3, "n_head": 3, "n_embd": 39, "vocab_size": 257},
    ],
    ids=str,
)
def test_logits_equal_those_of_transformers(tmp_path, sizes):
    hf_model = hf_gpt2(**sizes)
    hf_model.save_pretrained(tmp_path)
    model = GPT.from_pretrained(tmp_path)
    assert_same_logits(model, hf_model)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert not model.lm_head.weight[model.config.vocab_size :].any()
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not model.training


@pytest.mark.parametrize(
    ("preset", "smaller"),
    [
        ("gpt2", {"n_layer": 1, "vocab_size": 1009}),
        pytest.param("gpt2-xl", {"n_layer": 1, "vocab_size": 1009}, marks=pytest.mark.slow),
        pytest.param("gpt2", {}, marks=pytest.mark.slow),
    ],
    ids=str,
)
@torch.no_grad()
def test_presets_are_imported_and_exported_with_the_same_logits(tmp_path, preset, smaller):
    config = GPTConfig.preset(preset, **smaller)
    sizes = {name: getattr(config, name) for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
    hf_model = hf_gpt2(**sizes, n_positions=1024, initializer_range=0.02)
    hf_model.save_pretrained(tmp_path / "in")
    model = GPT.from_pretrained(tmp_path / "in")
    assert model.config == replace(config, dropout=0.1)
    ids = torch.arange(0, 1000, 100)[None]
    expected = hf_model(ids).logits
    torch.testing.assert_close(model(ids), expected, atol=1e-4, rtol=1e-4)
    model.save_pretrained(tmp_path / "out")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(exported(ids).logits, expected, atol=1e-4, rtol=1e-4)


def test_a_bare_model_and_old_mask_buffers_are_supported(tmp_path):
    hf_model = hf_gpt2()
    bare = GPT2Model(hf_model.config)
    bare.load_state_dict(hf_model.transformer.state_dict())
    bare.save_pretrained(tmp_path)
    masks = {"h.0.attn.bias": torch.ones(1, 1, 12, 12).tril(), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    edit_tensors(tmp_path, lambda tensors: tensors | masks)
    assert "wte.weight" in load_file(tmp_path / "model.safetensors")
    assert_same_logits(GPT.from_pretrained(tmp_path), hf_model)


def test_a_stored_head_must_equal_the_embedding(folder):
    edit_tensors(folder, lambda t: t | {"lm_head.weight": t["transformer.wte.weight"].clone()})
    assert_same_logits(GPT.from_pretrained(folder), hf_gpt2())
    edit_tensors(folder, lambda t: t | {"lm_head.weight": t["lm_head.weight"] + 1})
    with pytest.raises(ModelError, match="Only models with a tied head"):
        GPT.from_pretrained(folder)


def test_sharded_weights_are_read(tmp_path):
    hf_model = hf_gpt2()
    hf_model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same_logits(GPT.from_pretrained(tmp_path), hf_model)
    next(tmp_path.glob("model-*.safetensors")).unlink()
    with pytest.raises(ModelError, match=r"lists model-.*missing"):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_only_the_heads_name_of_the_tied_pair_is_stored(folder, prefix):
    expected = GPT.from_pretrained(folder)
    hf_model = hf_gpt2()
    save_model(hf_model, str(folder / "model.safetensors"), metadata={"format": "pt"})
    edit_tensors(folder, lambda tensors: {f"{prefix}{name}": tensor for name, tensor in tensors.items()})
    assert f"{prefix}transformer.wte.weight" not in load_file(folder / "model.safetensors")
    assert_same_logits(GPT.from_pretrained(folder), hf_model)
    assert GPT.from_pretrained(folder).config == expected.config


@pytest.mark.parametrize(
    "wrap",
    [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"_orig_mod.module.{name}",
        lambda name: name.replace("h.1.", "h.1._orig_mod."),
        lambda name: name.replace("transformer.", "transformer._orig_mod."),
        lambda name: f"_fsdp_wrapped_module.{name}".replace("h.0.", "h.0._checkpoint_wrapped_module."),
        lambda name: f"module.{name.removeprefix('transformer.')}",
    ],
)
def test_prefixes_of_wrappers_are_removed(folder, wrap):
    edit_tensors(folder, lambda tensors: {wrap(name): tensor for name, tensor in tensors.items()})
    assert_same_logits(GPT.from_pretrained(folder), hf_gpt2())


@pytest.mark.parametrize("prefix", ["model.", "base_model.model.", "gpt.", "modules."])
def test_other_prefixes_are_named(folder, prefix):
    edit_tensors(folder, lambda tensors: {f"{prefix}{name}": tensor for name, tensor in tensors.items()})
    with pytest.raises(ModelError, match=rf"prefix '{prefix}'"):
        GPT.from_pretrained(folder)


def test_weights_of_another_model_are_not_called_layers(folder):
    edit_tensors(folder, lambda tensors: {"layers.0.weight": torch.ones(2)})
    with pytest.raises(ModelError, match=r"such as layers\.0\.weight"):
        GPT.from_pretrained(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_are_converted_to_the_requested_dtype(tmp_path, dtype):
    hf_gpt2().to(dtype).save_pretrained(tmp_path)
    assert {p.dtype for p in GPT.from_pretrained(tmp_path).parameters()} == {torch.float32}
    assert {p.dtype for p in GPT.from_pretrained(tmp_path, dtype=dtype).parameters()} == {dtype}


def test_dropout_is_read_from_the_config(folder):
    assert GPT.from_pretrained(folder).config.dropout == 0.1
    edit_json(folder / "config.json", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    assert GPT.from_pretrained(folder).config.dropout == 0.0


@pytest.mark.parametrize("changes", [{"resid_pdrop": 0.3}, {"embd_pdrop": 0.0, "attn_pdrop": 0.2}])
def test_different_dropouts_are_named(folder, changes):
    edit_json(folder / "config.json", **changes)
    with pytest.warns(UserWarning, match="resid_pdrop=.*embd_pdrop=.*attn_pdrop="):
        model = GPT.from_pretrained(folder)
    assert model.config.dropout == max(changes.values())


def test_settings_of_generation_that_an_export_leaves_out_are_named(folder):
    edit_json(folder / "generation_config.json", repetition_penalty=1.7, suppress_tokens=[3], max_length=None)
    with pytest.warns(UserWarning, match=r"sets repetition_penalty=1\.7, suppress_tokens=\[3\], which"):
        GPT.from_pretrained(folder)


def test_pickled_weights_are_rejected(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"Pickled weights .* are not supported"):
        GPT.from_pretrained(folder)


ALIASES = GPT2Config.attribute_map


def rename(path, names):
    config = json.loads(path.read_text())
    path.write_text(json.dumps({names.get(name, name): value for name, value in config.items()}))


@pytest.mark.parametrize("alias", ALIASES)
def test_aliases_of_sizes_are_read_as_transformers_does(folder, alias):
    rename(folder / "config.json", {ALIASES[alias]: alias})
    hf_model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert hf_model.config.n_head == 2
    assert_same_logits(GPT.from_pretrained(folder), hf_model)


def test_an_alias_beside_the_name_wins_as_in_transformers(folder):
    edit_json(folder / "config.json", num_attention_heads=4)
    assert GPT.from_pretrained(folder).config.n_head == 4
    assert_same_logits(GPT.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval())


@pytest.mark.parametrize("name", ["num_heads", "n_heads", "heads", None])
def test_a_size_under_an_unknown_name_does_not_become_the_default(folder, name):
    rename(folder / "config.json", {"n_head": name or "n_head_removed"})
    with pytest.raises(ModelError, match="has no n_head"):
        GPT.from_pretrained(folder)


def test_every_field_of_transformers_config_is_known(folder):
    without_effect = {
        *("architectures", "transformers_version", "dtype", "id2label", "label2id", "problem_type"),  # descriptions
        *("output_hidden_states", "return_dict", "use_cache"),  # what transformers' forward returns
        *("bos_token_id", "eos_token_id", "pad_token_id"),  # read with the tokenizer
        "initializer_range",  # for new weights
        "reorder_and_upcast_attn",  # the order of operations, for half precision
        "chunk_size_feed_forward",  # not used by GPT-2
        "is_encoder_decoder",
        *(f"summary_{name}" for name in ("type", "use_proj", "activation", "proj_to_labels", "first_dropout")),
    }
    known = {*hf_config.SIZE_FIELDS.values(), *hf_config.FIXED_FIELDS, *hf_config.DROPOUT_FIELDS}
    assert {field.name for field in fields(GPT2Config)} == known | without_effect | {"n_inner"}
    assert hf_config.SIZE_ALIASES == {name: alias for alias, name in GPT2Config.attribute_map.items()}


def test_fields_without_effect_are_ignored(folder):
    expected = GPT.from_pretrained(folder)
    edit_json(
        folder / "config.json",
        n_ctx=12,
        task_specific_params={"text-generation": {"do_sample": True}},
        reorder_and_upcast_attn=True,
        rope_theta=10_000,
        **{"my_tool/version": 3},
    )
    assert GPT.from_pretrained(folder).config == expected.config


BAD_DROPOUTS = [("resid_pdrop", 7), ("embd_pdrop", -0.1), ("attn_pdrop", float("nan")), ("attn_pdrop", True)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": "2"}, "n_head='2'"),
        ({"hidden_size": None}, "n_embd=None"),
        ({"model_type": "llama"}, "'llama'.*Only GPT-2"),
        ({"activation_function": "relu"}, "activation_function='relu'"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon=1e-06"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False"),
        ({"n_inner": 17}, "n_inner=17"),
        ({"n_layer": "2"}, "n_layer='2'"),
        ({"n_layer": 10**9}, "n_layer=1000000000, but the weights have 2"),
        ({"n_embd": 10**9}, "requires"),
        ({"vocab_size": 10**12}, "requires"),
        ({"n_positions": -3}, "requires"),
        ({"n_head": 3}, "n_embd=16 is not a multiple of n_head=3"),
        ({"resid_pdrop": []}, "must be numbers"),
        *(({name: value}, f"{name}.*must be numbers") for name, value in BAD_DROPOUTS),
    ],
)
def test_unsupported_architectures_are_rejected(folder, changes, message):
    edit_json(folder / "config.json", **changes)
    with pytest.raises(HomebrewError, match=message):
        GPT.from_pretrained(folder)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t | {"transformer.h.0.extra": torch.ones(1)}, "unknown transformer.h.0.extra"),
        (
            lambda t: {n: v for n, v in t.items() if n != "transformer.ln_f.bias"},
            "missing transformer.ln_f.bias",
        ),
        (
            lambda t: {n: v for n, v in t.items() if n != "transformer.wte.weight"},
            "has no transformer.wte.weight",
        ),
        (
            lambda t: t | {"wpe.weight": t["transformer.wpe.weight"].clone()},
            "transformer.wpe.weight occurs twice",
        ),
        (lambda t: t | {"transformer.ln_f.bias": torch.ones(17)}, r"transformer.ln_f.bias.*\(17,\).*\(16,\)"),
        (lambda t: t | {"transformer.ln_f.bias": torch.ones(16, dtype=torch.int64)}, "torch.int64"),
        (lambda t: t | {"transformer.h.0.attn.c_attn.weight": torch.ones(48, 16)}, r"\(48, 16\).*\(16, 48\)"),
    ],
)
def test_tensors_that_do_not_match_the_config_are_named(folder, edit, message):
    edit_tensors(folder, edit)
    with pytest.raises(ModelError, match=message):
        GPT.from_pretrained(folder)


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "x.bin",
        "..safetensors/../x",
        "",
        "a\n.safetensors",
    ],
)
def test_an_index_can_list_only_safetensors_files_in_the_same_folder(folder, name):
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ModelError, match=r"Only \.safetensors files in the same folder"):
        GPT.from_pretrained(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 8,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 66) + b'{"transformer.wte.weight":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}',
    ],
    ids=len,
)
def test_invalid_safetensors_files_are_rejected(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError):
        GPT.from_pretrained(folder)


def test_a_folder_without_a_config_is_rejected(folder):
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        GPT.from_pretrained(folder)


class EndingTokenizer(ByteTokenizer):
    """Tokenizer with a token that ends a text, unless the model says otherwise."""

    vocab_size, end_of_text_id = 5, 4


@pytest.mark.parametrize(
    ("config", "generation_config", "expected"),
    [
        ({"eos_token_id": 7}, None, 7),
        ({"eos_token_id": [7]}, None, 7),
        ({"eos_token_id": None}, None, None),
        ({"eos_token_id": 7}, {"eos_token_id": 8}, 8),
        ({"eos_token_id": 7}, {"eos_token_id": None}, None),
        ({"eos_token_id": 7}, {"bos_token_id": 3}, None),
        ({"eos_token_id": 7}, {}, None),
        ({"eos_token_id": 70}, None, None),  # outside the vocabulary, so no text ends
    ],
)
def test_the_models_own_end_of_text_survives_an_export(folder, tmp_path, config, generation_config, expected):
    (folder / "generation_config.json").unlink()
    edit_json(folder / "config.json", **config)
    if generation_config is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation_config))
    expected_by_transformers = AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id
    assert expected_by_transformers in (expected, [expected], 70)
    model = GPT.from_pretrained(folder)
    assert model.config.end_of_text_id(EndingTokenizer()) == expected
    model.save_pretrained(tmp_path / "out", tokenizer=EndingTokenizer())
    assert GPT.from_pretrained(tmp_path / "out").config.end_of_text_id(EndingTokenizer()) == expected
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config.eos_token_id == expected


@pytest.mark.parametrize("eos", [[7, 8], "</s>", True, 7.0])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_other_ends_of_text_are_refused_by_name(folder, file, eos):
    edit_json(folder / file, eos_token_id=eos)
    if file == "config.json":  # transformers prefers the other file
        (folder / "generation_config.json").unlink()
    with pytest.raises(ModelError, match="eos_token_id"):
        GPT.from_pretrained(folder)


def test_the_default_end_of_text_is_that_of_gpt2(folder):
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    del config["eos_token_id"]
    (folder / "config.json").write_text(json.dumps(config))
    assert GPT.from_pretrained(folder).config.eos_token_id == -1  # 50,256 is outside the vocabulary of 70


def test_each_file_of_weights_is_opened_twice_to_find_and_to_read_its_tensors(folder, monkeypatch):
    opened = []
    read_header = bounded_readers.read_header
    monkeypatch.setattr(
        bounded_readers, "read_header", lambda file, path, error: opened.append(path) or read_header(file, path, error)
    )
    GPT.from_pretrained(folder)
    assert len(opened) == 2


def test_each_configuration_file_is_read_once(folder, monkeypatch):
    read = []
    read_json = hf_config.read_json
    monkeypatch.setattr(hf_config, "read_json", lambda path: read.append(path.name) or read_json(path))
    GPT.from_pretrained(folder)
    assert read == ["config.json", "generation_config.json"]


@pytest.mark.parametrize("dtype", ["float16", None, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_an_unsupported_dtype_is_rejected(folder, dtype):
    with pytest.raises(ConfigError, match="dtype="):
        GPT.from_pretrained(folder, dtype=dtype)


@pytest.mark.parametrize("lora", [5, {"rank": 2}])
def test_an_adapter_configuration_of_another_type_is_rejected(folder, lora):
    with pytest.raises(ConfigError, match="LoRAConfig"):
        GPT.from_pretrained(folder, lora=lora)
