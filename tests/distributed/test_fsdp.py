from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin

from homebrew import GPT, GPTConfig
from homebrew.distributed.accelerator import build_accelerator
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


def sharded(num_processes=2, **settings):
    """As much of an Accelerator as says what the launch asks for; a real one has FSDP on GPUs only."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, **settings)
    plugin.set_mixed_precision("bf16")
    state = SimpleNamespace(fsdp_plugin=plugin, dynamo_plugin=Accelerator(cpu=True).state.dynamo_plugin)
    return SimpleNamespace(state=state, parallelism_config=None, num_processes=num_processes, is_fsdp2=True)


def test_without_fsdp_nothing_is_done():
    assert configure_fsdp(Accelerator(cpu=True)) is False
    assert keeps_weights_gathered(Accelerator(cpu=True)) is False


def test_what_accelerate_leaves_open_is_set():
    accelerator = sharded(activation_checkpointing=True, cpu_ram_efficient_loading=True)
    plugin = accelerator.state.fsdp_plugin
    assert plugin.mixed_precision_policy.reduce_dtype == torch.bfloat16  # as long as Accelerate has it so
    assert configure_fsdp(accelerator) is True  # ours repeats dropout's masks
    assert plugin.activation_checkpointing is False
    assert plugin.cpu_ram_efficient_loading is False
    assert plugin.transformer_cls_names_to_wrap == ["Block"]
    policy = plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) == (torch.bfloat16, torch.float32, None)


@pytest.mark.parametrize(
    ("num_processes", "reshard", "stays"), [(2, True, False), (2, False, True), (1, True, True), (1, False, True)]
)
def test_weights_stay_gathered_where_asked_or_where_there_is_nobody_to_share_with(num_processes, reshard, stays):
    accelerator = sharded(num_processes, reshard_after_forward=reshard)
    configure_fsdp(accelerator)
    assert keeps_weights_gathered(accelerator) is stays


@pytest.mark.parametrize(
    ("settings", "told"),
    [({"fsdp_version": 1}, "fsdp_version: 1"), ({"fsdp_version": 2, "cpu_offload": True}, "fsdp_offload_params: true")],
)
def test_what_cannot_be_sharded_by_is_refused(settings, told):
    plugin = FullyShardedDataParallelPlugin(**settings)
    with pytest.raises(LaunchError, match=told):
        check_fsdp_options(Accelerator(cpu=True), plugin)


def test_a_compiler_around_the_shards_is_refused():
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    with pytest.raises(LaunchError, match="dynamo_backend"):
        check_fsdp_options(Accelerator(cpu=True, dynamo_backend="eager"), plugin)


def test_sizes_that_are_not_the_world(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "2")
    monkeypatch.setenv("PARALLELISM_CONFIG_DP_SHARD_SIZE", "8")
    with pytest.raises(LaunchError, match=r"is for 2 × 8 processes .* but it started 1"):
        build_accelerator(output_dir=tmp_path)


@pytest.mark.parametrize("beside_a_gpu", [False, True])
def test_half_precision_that_a_cpu_does_not_have(tmp_path, monkeypatch, beside_a_gpu):
    if beside_a_gpu:
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for kind in (torch.accelerator, torch.cuda):
        monkeypatch.setattr(kind, "is_available", lambda: beside_a_gpu)
    with pytest.raises(LaunchError, match="'fp16' cannot be used on cpu"):
        build_accelerator(output_dir=tmp_path, mixed_precision="fp16")
    build_accelerator(output_dir=tmp_path, mixed_precision="no")  # Accelerate kept nothing


@pytest.mark.parametrize("adapted", [False, True])
def test_a_copy_takes_no_memory_until_it_is_filled(adapted):
    model = GPT(SHAPE)
    if adapted:
        add_lora(model, LoRAConfig(rank=2))
    empty = meta_copy(model)
    assert all(parameter.is_meta for parameter in empty.parameters())
    copy = gather_full_model(empty, model)
    assert all(parameter.is_meta for parameter in empty.parameters())
    ids = torch.arange(10)[None]
    assert copy(ids).equal(model.eval()(ids))
    assert copy.lm_head.weight is copy.transformer.wte.weight
    assert len(list(copy.parameters())) == len(list(model.parameters()))
