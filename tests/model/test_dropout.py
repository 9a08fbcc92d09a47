"""The four places of GPT-2's dropout, each seen alone: what it receives is constant, so its output shows the mask."""

import pytest
import torch
from torch import nn

from homebrew import GPT, GPTConfig
from homebrew.model.lora import LoRAConfig, add_lora

DROPOUT = 0.3
CONFIG = GPTConfig(block_size=64, vocab_size=50, n_layer=2, n_head=8, n_embd=64, dropout=DROPOUT)


def set_constant(linear, value):
    nn.init.zeros_(linear.weight)
    nn.init.constant_(linear.bias, value)


def embedding(model, capture):
    """The input of the first block, whose embeddings are 1 + 0."""
    nn.init.ones_(model.transformer.wte.weight)
    nn.init.zeros_(model.transformer.wpe.weight)
    model.transformer.h[0].register_forward_pre_hook(lambda _, inputs: capture(inputs[0]))


def attention_weights(model, capture):
    """Attention's values at the first position, whose only weight is 1, for values of 1."""
    attention = model.transformer.h[1].attn
    set_constant(attention.c_attn, 1.0)
    heads = (-1, CONFIG.block_size, CONFIG.n_head, CONFIG.n_embd // CONFIG.n_head)

    def first_position(_, inputs):
        values = inputs[0].view(heads)[:, 0]  # (B, nh, hs)
        assert torch.equal(values, values[..., :1].expand_as(values)), "a head's weight is dropped as a whole"
        capture(values[..., 0])

    attention.c_proj.register_forward_pre_hook(first_position)


def attention_projection(model, capture):
    """The output of attention, whose projection is 1 for any input."""
    attention = model.transformer.h[1].attn
    set_constant(attention.c_proj, 1.0)
    attention.register_forward_hook(lambda _, inputs, output: capture(output))


def mlp(model, capture):
    """The output of the MLP, whose second layer is 1 for any input."""
    module = model.transformer.h[1].mlp
    set_constant(module.c_proj, 1.0)
    module.register_forward_hook(lambda _, inputs, output: capture(output))


def mlp_with_lora(model, capture):
    mlp(model, capture)
    add_lora(model, LoRAConfig(rank=2, target_modules=("mlp.c_proj",)))


PLACES = [embedding, attention_weights, attention_projection, mlp, mlp_with_lora]


def observe(place, *, dtype=None, training=True):
    """Return what a place of a new model gives for random tokens."""
    captured = []
    model = GPT(CONFIG).train(training)
    place(model, captured.append)
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        model.transformer(torch.randint(CONFIG.vocab_size, (64, CONFIG.block_size)))
    return captured[0].float()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("place", PLACES)
def test_each_place_drops_a_fraction_and_scales_the_rest(place, dtype):
    values = observe(place, dtype=dtype)
    dropped = values == 0
    torch.testing.assert_close(
        values[~dropped], torch.full_like(values[~dropped], 1 / (1 - DROPOUT)), rtol=2**-8, atol=0.0
    )
    deviation = (DROPOUT * (1 - DROPOUT) / dropped.numel()) ** 0.5
    assert abs(dropped.float().mean().item() - DROPOUT) < 5 * deviation


@pytest.mark.parametrize("place", PLACES)
def test_no_place_drops_anything_during_evaluation(place):
    values = observe(place, training=False)
    torch.testing.assert_close(values, torch.ones_like(values))
