"""Tests of the transformer: its cache and the paths of the MLP."""

import pytest
import torch
from torch import nn

from homebrew import GPT, GPTConfig
from homebrew.generation.kv_cache import KeyValueCache
from homebrew.model import transformer
from homebrew.model.lora import LoRAConfig, add_lora

CONFIG = GPTConfig(block_size=12, vocab_size=50, n_layer=2, n_head=2, n_embd=8)
IDS = torch.randint(50, (3, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("chunks", [(12,), (5, 1, 6)])
@pytest.mark.parametrize("activation_checkpointing", [False, True])
@torch.no_grad()
def test_a_cache_does_not_change_the_hidden_states(chunks, activation_checkpointing):
    model = GPT(CONFIG).eval()
    if activation_checkpointing:  # of training, so without effect
        model.enable_activation_checkpointing()
    expected = model.transformer(IDS)
    cache = KeyValueCache(CONFIG, 3, 12, device=IDS.device, dtype=torch.float32)
    hidden = []
    for slots in torch.arange(12).split(chunks):
        cache.set_slots(slots)
        hidden.append(model.transformer(IDS[:, slots], cache))
    torch.testing.assert_close(torch.cat(hidden, dim=1), expected, atol=1e-5, rtol=1e-5)
    assert all(keys.any() for keys in cache.keys)


def test_a_custom_block_always_receives_the_cache():
    class Recording(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block
            self.caches = []

        def forward(self, x, cache):
            self.caches.append(cache)
            return self.block(x, cache)

    model = GPT(CONFIG)
    block = model.transformer.h[0] = Recording(model.transformer.h[0])
    model(IDS, IDS).backward()
    model.generate(IDS[:, :4], max_new_tokens=1)
    assert [cache is None for cache in block.caches] == [True, False]


@pytest.mark.parametrize(
    ("target", "num_fused"), [(None, 2), ("mlp.c_fc", 0), ("mlp.c_proj", 0), ("h.1.mlp.c_fc", 1), ("c_attn", 2)]
)
def test_every_mlp_without_adapter_is_fused(monkeypatch, target, num_fused):
    calls, mlp = [], transformer.mlp
    monkeypatch.setattr(transformer, "mlp", lambda *args: calls.append(args) or mlp(*args))
    model = GPT(CONFIG)
    if target is not None:
        add_lora(model, LoRAConfig(rank=2, target_modules=(target,)))
    model(IDS, IDS).backward()
    assert len(calls) == num_fused


@pytest.mark.parametrize("layer", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"])
@pytest.mark.parametrize("kind", ["forward_pre_hook", "forward_hook", "full_backward_pre_hook", "full_backward_hook"])
def test_hooks_of_a_linear_layer_are_called_once_per_pass(layer, kind):
    model, calls = GPT(CONFIG), []
    register = getattr(model.transformer.h[1].get_submodule(layer), f"register_{kind}")
    register(lambda *args: calls.append(args))
    model(IDS, IDS).backward()
    assert len(calls) == 1
