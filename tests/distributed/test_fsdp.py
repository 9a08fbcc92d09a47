from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from language_models import NanoGPT, transformers_model

from homebrew import GPT, GPTConfig
from homebrew.distributed.fsdp import (
    check_fsdp_options,
    configure_fsdp,
    gather_full_model,
    keeps_weights_gathered,
    meta_copy,
)
from homebrew.errors import LaunchError
from homebrew.model.lora import LoRAConfig, add_lora

SHAPE = GPTConfig(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=16, dropout=0.1)


def fsdp_accelerator(num_processes=2, device="cpu", **settings):
    """A stand-in with the attributes that `configure_fsdp` reads; a real Accelerator has FSDP on GPUs only."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, **settings)
    plugin.set_mixed_precision("bf16")
    state = SimpleNamespace(fsdp_plugin=plugin, dynamo_plugin=Accelerator(cpu=True).state.dynamo_plugin)
    device = torch.device(device)
    return SimpleNamespace(
        state=state, parallelism_config=None, num_processes=num_processes, is_fsdp2=True, device=device
    )


def test_nothing_is_configured_without_fsdp():
    assert configure_fsdp(Accelerator(cpu=True), GPT(SHAPE)) is False
    assert keeps_weights_gathered(Accelerator(cpu=True)) is False


def test_configure_fsdp_overrides_accelerate_defaults():
    accelerator = fsdp_accelerator(activation_checkpointing=True, cpu_ram_efficient_loading=True)
    plugin = accelerator.state.fsdp_plugin
    assert plugin.mixed_precision_policy.reduce_dtype == torch.bfloat16  # the default that needs overriding
    assert configure_fsdp(accelerator, GPT(SHAPE)) is True
    assert plugin.activation_checkpointing is False
    assert plugin.cpu_ram_efficient_loading is False
    assert plugin.transformer_cls_names_to_wrap == ["Block"]
    policy = plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) == (torch.bfloat16, torch.float32, None)


@pytest.mark.parametrize(
    ("num_processes", "reshard", "expected"), [(2, True, False), (2, False, True), (1, True, True), (1, False, True)]
)
def test_keeps_weights_gathered(num_processes, reshard, expected):
    accelerator = fsdp_accelerator(num_processes, reshard_after_forward=reshard)
    configure_fsdp(accelerator, GPT(SHAPE))
    assert keeps_weights_gathered(accelerator) is expected


@pytest.mark.parametrize(("times", "expected"), [(15.9, False), (16, True), (100, True)])
def test_small_weights_are_kept_gathered(monkeypatch, times, expected):
    model = GPT(SHAPE)
    in_bfloat16 = 2 * sum(p.numel() for p in model.parameters())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (0, int(times * in_bfloat16)))
    accelerator = fsdp_accelerator(device="cuda", reshard_after_forward=True)
    configure_fsdp(accelerator, model)
    assert keeps_weights_gathered(accelerator) is expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"fsdp_version": 1}, "fsdp_version: 1"), ({"fsdp_version": 2, "cpu_offload": True}, "fsdp_offload_params: true")],
)
def test_unsupported_fsdp_options(settings, message):
    plugin = FullyShardedDataParallelPlugin(**settings)
    with pytest.raises(LaunchError, match=message):
        check_fsdp_options(Accelerator(cpu=True), plugin)


def test_launcher_compilation_is_not_supported_with_fsdp():
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    with pytest.raises(LaunchError, match="dynamo_backend"):
        check_fsdp_options(Accelerator(cpu=True, dynamo_backend="eager"), plugin)


def shared_mlp():
    model = NanoGPT()
    model.h[1].mlp = model.h[0].mlp
    return model


def shared_weight():
    model = NanoGPT()
    model.h[1].attention.weight = model.h[0].attention.weight
    return model


def block_tied_to_head():
    model = NanoGPT(vocab_size=96)
    model.h[0].attention.weight = model.lm_head.weight
    return model


def one_block_twice():
    model = NanoGPT()
    model.h[1] = model.h[0]
    return model


def norm_in_bfloat16():
    model = NanoGPT()
    model.h[0].norm.bfloat16()
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (shared_mlp, r"h\.1\.mlp\.0\.weight is shared"),
        (shared_weight, r"h\.1\.attention\.weight is shared"),
        (block_tied_to_head, "is shared"),
        (norm_in_bfloat16, "bfloat16 and torch.float32"),
    ],
)
def test_a_model_that_cannot_be_sharded_is_an_error_at_construction(model, message):
    accelerator = fsdp_accelerator()
    accelerator.state.fsdp_plugin.mixed_precision_policy = None
    with pytest.raises(LaunchError, match=message):
        configure_fsdp(accelerator, model())


@pytest.mark.parametrize("model", [one_block_twice, NanoGPT, lambda: transformers_model("qwen2")])
def test_the_blocks_of_other_models_are_sharded(model):
    accelerator = fsdp_accelerator()
    configure_fsdp(accelerator, model())
    (block,) = accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap
    assert block in ("Block", "Qwen2DecoderLayer")
    configure_fsdp(accelerator, norm_in_bfloat16())  # Accelerate casts the weights to float32


@pytest.mark.parametrize("lora", [False, True])
def test_meta_copy_and_gather_full_model(lora):
    model = GPT(SHAPE)
    if lora:
        add_lora(model, LoRAConfig(rank=2))
    template = meta_copy(model)
    full = gather_full_model(template, model)
    assert all(parameter.is_meta for parameter in template.parameters())
    ids = torch.arange(10)[None]
    assert full(ids).equal(model.eval()(ids))
    assert full.lm_head.weight is full.transformer.wte.weight
    assert len(list(full.parameters())) == len(list(model.parameters()))


def test_gather_full_model_keeps_an_untied_head():
    model = GPT(SHAPE)
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    full = gather_full_model(meta_copy(model), model)
    ids = torch.arange(10)[None]
    assert full(ids).equal(model.eval()(ids))
