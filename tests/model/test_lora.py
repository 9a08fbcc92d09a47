import dataclasses
import json
import math
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from homebrew.errors import ConfigError, ModelError
from homebrew.generation.sampling import Sampling
from homebrew.hub.peft import _KNOWN_FIELDS, load_adapter, save_adapter
from homebrew.model.gpt import GPT
from homebrew.model.gpt_config import GPTConfig
from homebrew.model.lora import (
    TARGET_MODULES,
    LoRAConfig,
    LoRALinear,
    adapter_state_dict,
    add_lora,
    base_fingerprint,
    load_adapter_state_dict,
    lora_layers,
    merge_lora,
    merged_state_dict,
    unmerge_lora,
)

CONFIG = GPTConfig(block_size=12, vocab_size=70, n_layer=2, n_head=2, n_embd=16)
IDS = torch.randint(70, (4, 13), generator=torch.Generator().manual_seed(0))


def base_model() -> GPT:
    """A model whose weights are all nonzero and large enough to affect the logits."""
    model = GPT(CONFIG)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
        model.lm_head.weight[70:] = 0.0
    return model.eval()


def trained_model(config: LoRAConfig | None = None, steps: int = 3) -> GPT:
    """The base model with an adapter trained for a few steps."""
    model = base_model()
    add_lora(model, config or LoRAConfig(rank=4))
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        model(IDS[:, :-1], IDS[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        out = model(IDS[:, :-1])
    return out if isinstance(out, torch.Tensor) else out.logits


def test_new_adapter_does_not_change_the_logits():
    model = base_model()
    before = logits(model)
    add_lora(model, LoRAConfig())
    assert torch.equal(logits(model), before)


def test_initial_a_is_uniform_and_b_is_zero():
    model = GPT(GPTConfig(block_size=8, vocab_size=10, n_layer=1, n_head=1, n_embd=256))
    add_lora(model, LoRAConfig(rank=32))
    for layer in lora_layers(model).values():
        bound = 1 / layer.in_features**0.5
        assert layer.lora_A.shape == (32, layer.in_features)
        assert 0.99 * bound < layer.lora_A.abs().max() <= bound
        assert layer.lora_A.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
        assert layer.lora_B.shape == (layer.out_features, 32)
        assert not layer.lora_B.any()


def test_seed_determines_the_adapter_without_global_random_state():
    before = torch.get_rng_state()
    first, same, other = base_model(), base_model(), base_model()
    add_lora(first, LoRAConfig(), seed=1)
    add_lora(same, LoRAConfig(), seed=1)
    add_lora(other, LoRAConfig(), seed=2)
    name = "transformer.h.0.attn.c_attn.lora_A"
    a, b, c = (adapter_state_dict(model)[name] for model in (first, same, other))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("seed", "same"), [(42, None), (0, 0), (-(2**63), -(2**63)), (-1, 2**64 - 1)])
def test_the_default_seed_and_the_limits_of_seeds(seed, same):
    one, other = base_model(), base_model()
    add_lora(one, LoRAConfig(), seed=seed)
    add_lora(other, LoRAConfig(), **({} if same is None else {"seed": same}))
    assert all(map(torch.equal, adapter_state_dict(one).values(), adapter_state_dict(other).values()))


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (("c_attn", "c_proj"), {"attn.c_attn", "attn.c_proj", "mlp.c_proj"}),
        (("c_fc",), {"mlp.c_fc"}),
        *(((name,), {name}) for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")),
        (TARGET_MODULES, {"attn.c_attn", "attn.c_proj", "mlp.c_proj", "mlp.c_fc"}),
    ],
)
def test_target_modules_are_adapted(targets, names):
    model = base_model()
    add_lora(model, LoRAConfig(target_modules=targets))
    assert set(lora_layers(model)) == {f"transformer.h.{i}.{name}" for i in range(2) for name in names}


def test_training_changes_only_the_adapter():
    before = base_model().state_dict()
    fingerprint = base_fingerprint(base_model())
    model = trained_model()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == set(adapter_state_dict(model))
    num_trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert num_trainable == 2 * 4 * ((16 + 48) + (16 + 16) + (64 + 16))
    after = model.state_dict()
    assert before.keys() == after.keys() - trainable
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert base_fingerprint(model) == fingerprint
    assert all(tensor.any() for tensor in adapter_state_dict(model).values())


def test_flops_do_not_count_gradients_of_frozen_weights():
    plain, model = base_model(), trained_model()
    adapter = sum(tensor.numel() for tensor in adapter_state_dict(model).values())
    attention = 12 * 2 * 16 * 12
    frozen = (plain.flops_per_token() - attention) // 6 * 4
    assert model.flops_per_token() == frozen + 6 * adapter + attention


def test_loss_decreases():
    model = trained_model(steps=0)
    initial_loss = model(IDS[:, :-1], IDS[:, 1:])
    assert trained_model(steps=20)(IDS[:, :-1], IDS[:, 1:]) < 0.8 * initial_loss


@pytest.mark.parametrize(("alpha", "scale"), [(None, 2.0), (4, 1.0), (1, 0.25)])
def test_update_is_scaled_by_alpha_over_rank(alpha, scale):
    linear = torch.nn.Linear(5, 3)
    layer = LoRALinear(linear, LoRAConfig(rank=4, alpha=alpha), torch.Generator().manual_seed(0))
    with torch.no_grad():
        layer.lora_B.normal_()
    x = torch.randn(2, 7, 5)
    expected = linear(x) + scale * (x @ layer.lora_A.T @ layer.lora_B.T)
    torch.testing.assert_close(layer(x), expected)


def test_dropout_applies_to_the_adapter_during_training_only():
    linear = torch.nn.Linear(5, 3)
    layer = LoRALinear(linear, LoRAConfig(rank=4, dropout=0.5), torch.Generator().manual_seed(0))
    x = torch.randn(2, 7, 5)
    assert torch.equal(layer(x), linear(x))
    with torch.no_grad():
        layer.lora_B.normal_()
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_a_layer_without_bias_stays_without():
    linear = torch.nn.Linear(5, 3, bias=False)
    layer = LoRALinear(linear, LoRAConfig(rank=2), torch.Generator())
    assert set(layer.state_dict()) == {"weight", "lora_A", "lora_B"}
    x = torch.ones(2, 5)
    assert torch.equal(layer(x), linear(x))


def test_an_adapter_is_on_the_device_of_its_layer():
    model = base_model().to("meta")
    add_lora(model, LoRAConfig())
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_the_original_weight_of_a_merged_adapter_is_not_in_the_state_dict():
    model = trained_model()
    merge_lora(model)
    assert all(layer.base_weight is not None for layer in lora_layers(model).values())
    assert not any("base_weight" in name for name in model.state_dict())


def test_merged_weights_keep_the_dtype_of_the_layers():
    model = base_model().to(torch.bfloat16)
    add_lora(model, LoRAConfig())
    assert {tensor.dtype for tensor in merged_state_dict(model).values()} == {torch.bfloat16}


def test_adapter_of_a_bfloat16_model_is_float32():
    model = base_model().to(torch.bfloat16)
    add_lora(model, LoRAConfig())
    model(IDS[:, :-1], IDS[:, 1:]).backward()
    for tensor in adapter_state_dict(model).values():
        assert tensor.dtype == torch.float32
    assert lora_layers(model)["transformer.h.0.mlp.c_proj"].lora_B.grad.any()


def test_merging_keeps_the_logits_and_unmerging_is_exact():
    model = trained_model()
    unmerged, before = logits(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert not torch.allclose(unmerged, logits(base_model()), atol=0.1)
    fingerprint = base_fingerprint(model)
    merge_lora(model)
    merge_lora(model)  # has no further effect
    torch.testing.assert_close(logits(model), unmerged, atol=1e-5, rtol=1e-5)
    name = "transformer.h.0.attn.c_attn.weight"
    assert not torch.equal(model.state_dict()[name], before[name])
    assert model.state_dict().keys() == before.keys()
    assert base_fingerprint(model) == fingerprint
    assert not any(parameter.requires_grad for parameter in model.parameters())
    unmerge_lora(model)
    unmerge_lora(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(adapter_state_dict(model))


@pytest.mark.parametrize("merged", [False, True])
def test_merged_state_dict_loads_into_a_model_without_adapter(merged):
    model = trained_model()
    expected = logits(model)
    if merged:
        merge_lora(model)
    plain = GPT(CONFIG)
    plain.load_state_dict(merged_state_dict(model))
    torch.testing.assert_close(logits(plain.eval()), expected, atol=1e-5, rtol=1e-5)


def test_adapter_state_dict_restores_the_adapter_exactly():
    state = {name: tensor.clone() for name, tensor in adapter_state_dict(trained_model()).items()}
    model = base_model()
    add_lora(model, LoRAConfig(rank=4), seed=9)
    load_adapter_state_dict(model, state)
    assert torch.equal(logits(model), logits(trained_model()))
    other = base_model()
    add_lora(other, LoRAConfig(rank=5))
    with pytest.raises(ModelError, match="12 adapter tensors"):
        load_adapter_state_dict(other, state)
    state.pop("transformer.h.0.attn.c_attn.lora_A")
    with pytest.raises(ModelError, match=r"1 adapter tensors, such as transformer\.h\.0\.attn\.c_attn\.lora_A"):
        load_adapter_state_dict(model, state)


def test_fingerprint_depends_on_values_and_dtypes():
    first, other = base_model(), base_model()
    assert base_fingerprint(first) == base_fingerprint(other)
    with torch.no_grad():
        other.transformer.ln_f.bias[0] += 1e-6
    assert base_fingerprint(first) != base_fingerprint(other)
    assert base_fingerprint(base_model().to(torch.bfloat16)) != base_fingerprint(first)


def test_generation_matches_the_merged_model():
    model = trained_model()
    merged = GPT(CONFIG)
    merged.load_state_dict(merged_state_dict(model))
    prompts, greedy = [[1, 2, 3], [4]], Sampling(temperature=0.0)
    assert model.generate(prompts, 8, sampling=greedy) == merged.generate(prompts, 8, sampling=greedy)


def gradients(model: GPT) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.slow
def test_compiled_training_step_matches_eager():
    model = trained_model().train()
    results = []
    for call in (torch.compile(model, backend="aot_eager", fullgraph=True), model):
        model.zero_grad()
        loss = call(IDS[:, :-1], IDS[:, 1:])
        loss.backward()
        results.append((loss, gradients(model)))
    torch.testing.assert_close(*results)


def test_training_saves_the_widest_activation_once_and_recomputes_little():
    # Training saves only the GELU's input. It recomputes the GELU for the adapter's gradient, but not the base product.
    model = trained_model()
    saved_is_widest = []

    def pack(tensor):
        saved_is_widest.append(tensor.numel() == 4 * 12 * 64)
        return tensor

    flops, num_widest, grads = {}, {}, {}
    for training in (False, True):
        model.train(training).zero_grad()
        saved_is_widest.clear()
        with FlopCounterMode(display=False) as counter:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                loss = model(IDS[:, :-1], IDS[:, 1:])
            loss.backward()
        flops[training], num_widest[training] = counter.get_total_flops(), sum(saved_is_widest)
        grads[training] = gradients(model)
    assert num_widest == {False: 2 * 2, True: 2}  # two blocks
    torch.testing.assert_close(grads[True], grads[False])
    recomputed = 2 * 2 * 4 * 12 * (64 * 4 + 4 * 16)  # c_proj's adapter in two blocks: 64 -> rank 4 -> 16
    assert flops[True] <= flops[False] + recomputed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank=0"),
        ({"rank": 2.0}, "rank=2.0"),
        ({"alpha": 0.0}, "alpha=0.0"),
        ({"alpha": 1e300}, "alpha=1e\\+300"),
        ({"alpha": 10**400}, "alpha=1000"),
        ({"alpha": math.nan}, "alpha=nan"),
        ({"rank": 10**30}, "rank=1000"),
        ({"rank": 65_537}, "rank=65537"),
        ({"alpha": 1_000_000.5}, r"alpha=1000000\.5"),
        ({"target_modules": ("h.\u0661.attn.c_attn",)}, "target_modules="),  # a digit, but not of ASCII
        *(({"alpha": value}, "alpha=") for value in ("a", True, [1.0])),
        *(({"dropout": value}, "dropout=") for value in ("x", True, None)),
        *(({"target_modules": value}, "target_modules=") for value in (5, (5,), None)),
        *(({"target_modules": value}, "Use a list such as") for value in ("c_attn", "all-linear", {"c_attn"})),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"target_modules": ("wte",)}, r"target_modules=\('wte',\)"),
        ({"target_modules": ()}, r"target_modules=\(\)"),
    ],
)
def test_invalid_config_is_rejected(options, message):
    with pytest.raises(ConfigError, match=message):
        LoRAConfig(**options)


def test_ranks_and_alpha_at_their_limits_are_valid():
    assert LoRAConfig(rank=65_536, alpha=1_000_000).scale == 1_000_000 / 65_536
    assert LoRAConfig(rank=1).scale == 2.0


@pytest.mark.parametrize("seed", [2**64, "1", 1.5, True])
def test_an_invalid_seed_is_rejected_by_name(seed):
    with pytest.raises(ConfigError, match=r"^seed="):
        add_lora(base_model(), LoRAConfig(), seed=seed)


def test_missing_or_second_adapter_is_an_error(tmp_path):
    model = base_model()
    for function in (merge_lora, unmerge_lora):
        with pytest.raises(ModelError, match="no adapter"):
            function(model)
    with pytest.raises(ModelError, match="no adapter to save"):
        save_adapter(model, tmp_path)
    add_lora(model, LoRAConfig())
    with pytest.raises(ModelError, match="already has an adapter"):
        add_lora(model, LoRAConfig())
    with pytest.raises(ModelError, match="No linear layer"):
        add_lora(torch.nn.Linear(2, 2), LoRAConfig())


# PEFT calls a deprecated function of transformers
peft_warning = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def saved_base(folder: Path) -> Path:
    base_model().save_pretrained(folder)
    return folder


@peft_warning
@pytest.mark.parametrize(
    "config",
    [
        LoRAConfig(),
        LoRAConfig(rank=3, alpha=5, dropout=0.1, target_modules=("c_fc", "c_attn")),
        LoRAConfig(target_modules=("attn.c_proj",)),
    ],
    ids=str,
)
def test_peft_loads_a_saved_adapter(tmp_path, config):
    model = trained_model(config)
    save_adapter(model, tmp_path / "adapter", base_model="openai-community/gpt2")
    reference = AutoModelForCausalLM.from_pretrained(saved_base(tmp_path / "base"))
    reference = peft.PeftModel.from_pretrained(reference, tmp_path / "adapter")
    torch.testing.assert_close(logits(reference), logits(model), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(reference), logits(base_model()), atol=0.05)
    torch.testing.assert_close(logits(reference.merge_and_unload()), logits(model), atol=1e-4, rtol=1e-4)


def random_peft_adapter(folder: Path, **options) -> peft.PeftModel:
    """Save a PEFT adapter of random values on the same base model."""
    model = AutoModelForCausalLM.from_pretrained(saved_base(folder / "base"))
    settings = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, "fan_in_fan_out": True, **options}
    model = peft.get_peft_model(model, peft.LoraConfig(**settings))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder / "adapter")
    return model.eval()


@peft_warning
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["c_attn", "c_proj"]},
        {"target_modules": ["c_fc", "attn.c_proj"], "lora_dropout": 0.3},
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.mlp\.c_(fc|proj)"},
        {"target_modules": ["c_attn"], "init_lora_weights": "gaussian"},
        {"target_modules": ["c_attn", "c_proj"], "layers_to_transform": [1]},
        {"target_modules": ["c_fc"], "layers_to_transform": 0, "layers_pattern": "h"},
        {"target_modules": ["transformer.h.1.attn.c_attn"], "layers_to_transform": [0]},
        {"target_modules": ["transformer.h.1.attn.c_attn", "c_fc"], "layers_to_transform": [0]},
        {"target_modules": ["h.1.attn.c_attn", "h.0.mlp.c_fc"], "layers_to_transform": [0]},
        {"target_modules": ["c_fc", "attn.c_proj"], "layers_to_transform": [0, 1], "layers_pattern": ["h"]},
        {"target_modules": ["c_attn", "c_proj"], "exclude_modules": ["mlp.c_proj"]},
        {"target_modules": ["c_attn", "c_fc"], "exclude_modules": ["transformer.h.0.attn.c_attn", "h.1.mlp.c_fc"]},
        {"target_modules": ["c_attn", "c_proj"], "exclude_modules": r".*h\.0\.attn.*"},
        {"target_modules": ["transformer.h.1.attn.c_attn", "h.0.mlp.c_fc"]},
        {"target_modules": r".*\.h\.1\.attn\.c_attn|.*\.c_fc"},
        {"target_modules": ["c_attn"], "rank_pattern": {}, "alpha_pattern": {}},
    ],
    ids=str,
)
def test_adapter_from_peft_is_loaded_and_saved(tmp_path, options):
    reference = random_peft_adapter(tmp_path, **options)
    model = base_model()
    load_adapter(model, tmp_path / "adapter")
    torch.testing.assert_close(logits(model), logits(reference), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(model), logits(base_model()), atol=0.05)
    save_adapter(model, tmp_path / "saved")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    reloaded = peft.PeftModel.from_pretrained(reloaded, tmp_path / "saved")
    torch.testing.assert_close(logits(reloaded), logits(reference), atol=1e-5, rtol=1e-5)


@peft_warning
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_rslora": True}, "use_rslora=True"),
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "all"}, "bias='all'"),
        ({"rank_pattern": {"c_attn": 2}}, "rank_pattern"),
        ({"modules_to_save": ["ln_f"]}, "modules_to_save"),
        ({"rank_pattern": {r"h\.0\..*c_attn": 2}}, "one rank and one alpha for all layers"),
        ({"alpha_pattern": {"h.1.attn.c_attn": 2}}, "alpha_pattern={.*one rank and one alpha for all layers"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ],
)
def test_unsupported_peft_options_are_rejected(tmp_path, options, message):
    random_peft_adapter(tmp_path, **options)
    with pytest.raises(ModelError, match=message):
        load_adapter(base_model(), tmp_path / "adapter")


def test_every_field_of_pefts_config_is_known_or_must_be_disabled():
    refused = {
        *("use_rslora", "use_dora", "use_qalora", "use_bdlora", "bias", "lora_bias", "modules_to_save"),
        *("rank_pattern", "alpha_pattern", "layer_replication", "trainable_token_indices", "target_parameters"),
        *("alora_invocation_tokens", "arrow_config", "kasa_config", "velora_config", "monteclora_config"),
    }
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert fields == refused | set(_KNOWN_FIELDS)


def test_adapter_that_does_not_fit_is_rejected_without_changing_the_model(tmp_path):
    save_adapter(trained_model(), tmp_path)
    config, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    good, tensors = json.loads(config.read_text()), load_file(weights)
    for changes, message in [
        ({"peft_type": "IA3"}, "'IA3'"),
        ({"r": 5}, "tensors, such as"),
        ({"r": "4"}, "rank='4'"),
        ({"lora_alpha": "x"}, "describe a supported adapter"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"a_new_kind_of_lora": True}, "a_new_kind_of_lora=True"),
    ]:
        config.write_text(json.dumps(good | changes))
        model = base_model()
        with pytest.raises(ModelError, match=message):
            load_adapter(model, tmp_path)
        assert not lora_layers(model)
        assert all(parameter.requires_grad for parameter in model.parameters())
    config.write_text(json.dumps(good))
    head = {f"base_model.model.lm_head.lora_{side}.weight": torch.ones(4, 4) for side in "AB"}
    llama = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 4)}
    for changed in ({}, head, tensors | head, llama):
        save_file(changed, weights)
        with pytest.raises(ModelError, match="which the model does not have"):
            load_adapter(base_model(), tmp_path)
    for lost in ("h.1.", "h.0.attn.c_attn"):  # as in an adapter of a model with fewer blocks
        save_file({name: tensor for name, tensor in tensors.items() if lost not in name}, weights)
        with pytest.raises(ModelError, match=rf"selects transformer\.{lost}.*no tensors"):
            load_adapter(base_model(), tmp_path)
    save_file({name: tensor for name, tensor in tensors.items() if "h.1.attn.c_attn.lora_B" not in name}, weights)
    with pytest.raises(ModelError, match=r"h\.1\.attn\.c_attn\.lora_B"):
        load_adapter(base_model(), tmp_path)
    save_file(tensors | {"base_model.model.transformer.wte.weight": torch.ones(70, 16)}, weights)
    with pytest.raises(ModelError, match=r"wte\.weight, which is not part"):
        load_adapter(base_model(), tmp_path)
    weights.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"no adapter_model\.safetensors.*Pickled weights \(adapter_model\.bin\)"):
        load_adapter(base_model(), tmp_path)


@pytest.mark.parametrize("wrap", ["base_model.model._orig_mod.", "module.base_model.model.", "_orig_mod."])
def test_prefixes_of_wrappers_in_an_adapter_are_removed(tmp_path, wrap):
    save_adapter(model := trained_model(), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({name.replace("base_model.model.", wrap): tensor for name, tensor in load_file(path).items()}, path)
    loaded = base_model()
    load_adapter(loaded, tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    tensors = load_file(path)
    save_file(tensors | adapter_state_dict(model), path)
    with pytest.raises(ModelError, match="twice"):
        load_adapter(base_model(), tmp_path)


def test_from_pretrained_adds_an_adapter_and_save_pretrained_merges_it(tmp_path):
    torch.manual_seed(0)
    reference = GPT2LMHeadModel(
        GPT2Config(vocab_size=70, n_positions=12, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3)
    )
    reference.save_pretrained(tmp_path / "in")
    model = GPT.from_pretrained(tmp_path / "in", lora=LoRAConfig(rank=2))
    torch.testing.assert_close(logits(model), logits(reference.eval()), atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        for tensor in adapter_state_dict(model).values():
            tensor.normal_(std=0.3)
    model.save_pretrained(tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(merged), logits(model), atol=1e-4, rtol=1e-4)
    assert lora_layers(model)
