"""Tests of the initial weights of a GPT. `test_gpt.py` tests those of GPT-2."""

import math

import pytest
import torch

from homebrew import GPT, ConfigError, GPTConfig
from homebrew.model.initial_weights import sinusoids

CONFIG = GPTConfig(block_size=64, vocab_size=100, n_layer=2, n_head=2, n_embd=32)


def test_sinusoidal_weights_differ_in_positions_queries_and_keys():
    plain, model = GPT(CONFIG).state_dict(), GPT(CONFIG, init="sinusoidal").state_dict()
    for name, weight in model.items():
        if name.endswith("wpe.weight"):
            assert weight.square().mean().sqrt() == pytest.approx(0.02, rel=1e-5)
        elif name.endswith("c_attn.weight"):
            assert torch.equal(weight[:64], 2 * plain[name][:64])
            assert torch.equal(weight[64:], plain[name][64:])
        else:
            assert torch.equal(weight, plain[name])


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


def test_the_first_loss_is_that_of_a_uniform_prediction():
    ids = torch.randint(100, (4, 65), generator=torch.Generator().manual_seed(0))
    loss = GPT(CONFIG, init="sinusoidal")(ids[:, :-1], ids[:, 1:])
    assert loss.item() == pytest.approx(math.log(100), abs=0.05)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_an_unknown_init_is_rejected(device):
    with pytest.raises(ConfigError, match="gpt2, sinusoidal"), torch.device(device):
        GPT(CONFIG, init="sinusoid")
