"""Tests of the initial weights of a GPT. `test_gpt.py` tests those of GPT-2."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from homebrew import GPT, ConfigError, GPTConfig
from homebrew.model.initial_weights import UninitializedWeights, look_back, sinusoids

CONFIG = GPTConfig(block_size=64, vocab_size=100, n_layer=2, n_head=2, n_embd=32)


def test_local_weights_differ_in_positions_queries_and_keys():
    plain, model = GPT(CONFIG).state_dict(), GPT(CONFIG, init="local").state_dict()
    for name, weight in model.items():
        if name.endswith("wpe.weight"):
            assert weight.square().mean().sqrt() == pytest.approx(0.02, rel=1e-5)
        elif name.endswith("c_attn.weight"):
            queries, keys, values = weight.split(32)
            assert torch.equal(queries, 1.5 * plain[name][:32])
            torch.testing.assert_close(keys.norm(dim=1), queries.norm(dim=1))
            assert torch.equal(keys[:16], queries[:16])  # the first head looks at its own position
            assert torch.equal(values, plain[name][64:])
        else:
            assert torch.equal(weight, plain[name])


@pytest.mark.parametrize(("n_embd", "n_head"), [(256, 4), (255, 5)])
def test_by_positions_alone_each_head_looks_back_by_its_index(n_embd, n_head):
    weight = torch.randn(3 * n_embd, n_embd, generator=torch.Generator().manual_seed(0))
    look_back(weight, n_head)
    queries, keys = (sinusoids(100, n_embd) @ weight[: 2 * n_embd].T).view(100, 2, n_head, -1).permute(1, 2, 0, 3)
    preferred = (queries @ keys.mT).tril().argmax(-1)  # (n_head, position)
    for head in range(n_head):
        distances = (torch.arange(100) - preferred[head])[head:]
        assert distances.mode().values == head


def test_tokens_attend_to_themselves_then_to_the_distance_of_the_head():
    config = GPTConfig(block_size=128, vocab_size=128, n_layer=1, n_head=12, n_embd=768)
    model = GPT(config, init="local")
    ids = torch.randperm(128, generator=torch.Generator().manual_seed(0))
    hidden = F.layer_norm(model.transformer.wte.weight[ids] + model.transformer.wpe.weight, (768,))
    products = hidden @ model.state_dict()["transformer.h.0.attn.c_attn.weight"].T
    queries, keys, _ = products.view(128, 3, 12, 64).permute(1, 2, 0, 3)
    for head, scores in enumerate(queries @ keys.mT):
        by_distance = torch.stack([scores.diagonal(-distance).mean() for distance in range(32)])
        assert by_distance.argmax() == 0
        assert by_distance[1:].argmax() + 1 == pytest.approx(max(head, 1), abs=1)


def test_the_product_of_two_sinusoids_depends_on_their_distance():
    x = sinusoids(50, 16).double()
    products = x @ x.T
    for distance in (0, 1, 7):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4, rtol=0)
    assert x[:, 0].tolist() == pytest.approx([math.sin(position) for position in range(50)], abs=1e-6)


@pytest.mark.parametrize(("length", "width"), [(1, 1), (3, 5), (4, 2)])
def test_sinusoids_of_any_size(length, width):
    x = sinusoids(length, width)
    assert x.shape == (length, width)
    assert torch.equal(x[0], torch.arange(width) % 2 * 1.0)  # sin 0 and cos 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_default_dtype_only_rounds_the_sinusoids(dtype):
    config = GPTConfig(block_size=70_000, vocab_size=1, n_layer=1, n_head=1, n_embd=2)
    expected = GPT(config, init="local").state_dict()["transformer.wpe.weight"]
    torch.set_default_dtype(dtype)
    try:
        model = GPT(config, init="local")
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(model.transformer.wpe.weight.data, expected.to(dtype))


@pytest.mark.parametrize(("n_embd", "n_head"), [(1, 1), (2, 1), (3, 3), (33, 11)])
def test_local_weights_of_any_width(n_embd, n_head):
    config = GPTConfig(block_size=1, vocab_size=50, n_layer=1, n_head=n_head, n_embd=n_embd)
    queries, keys, _ = GPT(config, init="local").state_dict()["transformer.h.0.attn.c_attn.weight"].split(n_embd)
    torch.testing.assert_close(keys.norm(dim=1), queries.norm(dim=1))


def test_the_first_loss_is_that_of_a_uniform_prediction():
    ids = torch.randint(100, (4, 65), generator=torch.Generator().manual_seed(0))
    loss = GPT(CONFIG, init="local")(ids[:, :-1], ids[:, 1:])
    assert loss.item() == pytest.approx(math.log(100), abs=0.05)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_an_unknown_init_is_rejected(device):
    with pytest.raises(ConfigError, match="gpt2, local"), torch.device(device):
        GPT(CONFIG, init="sinusoid")


@pytest.mark.parametrize(
    "build",
    [lambda: nn.Linear(8, 4), lambda: nn.Linear(8, 4, bias=False), lambda: nn.Embedding(8, 4)],
    ids=["linear", "no_bias", "embedding"],
)
def test_layers_draw_no_weights(build):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with UninitializedWeights():
        layer = build()
    assert torch.equal(torch.get_rng_state(), before)
    assert layer.weight.requires_grad
    build()
    assert not torch.equal(torch.get_rng_state(), before)


def test_layer_norms_keep_their_values():
    with UninitializedWeights():
        norm = nn.LayerNorm(4)
    assert torch.equal(norm.weight, torch.ones(4))
    assert not norm.bias.any()


def test_layers_can_be_on_the_meta_device():
    with torch.device("meta"), UninitializedWeights():
        assert nn.Linear(8, 4).weight.is_meta
