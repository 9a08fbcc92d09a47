import pytest
import torch
from torch import nn

from homebrew.model.uninitialized import UninitializedWeights


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
