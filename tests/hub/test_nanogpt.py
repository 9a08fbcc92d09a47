"""Conversion of nanoGPT's checkpoints. The model below has the interface and the names of nanoGPT's model.py."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from homebrew import load_nanogpt
from homebrew.errors import ModelError

SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 12, "vocab_size": 70, "dropout": 0.1}


class Attention(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(16, 48, bias=bias), nn.Linear(16, 16, bias=bias)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.c_attn(x).split(16, dim=-1))
        return self.c_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(16, 64, bias=bias), nn.Linear(64, 16, bias=bias)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x)))  # exact


class Block(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(16, bias=bias), Attention(bias)
        self.ln_2, self.mlp = nn.LayerNorm(16, bias=bias), MLP(bias)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    def __init__(self, bias):
        super().__init__()
        parts = {"wte": nn.Embedding(70, 16), "wpe": nn.Embedding(12, 16)}
        blocks = nn.ModuleList([Block(bias), Block(bias)])
        self.transformer = nn.ModuleDict({**parts, "h": blocks, "ln_f": nn.LayerNorm(16, bias=bias)})
        self.lm_head = nn.Linear(16, 70, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, ids):
        x = self.transformer.wte(ids) + self.transformer.wpe(torch.arange(ids.shape[1]))
        for block in self.transformer.h:
            x = block(x)
        return self.lm_head(self.transformer.ln_f(x))


def checkpoint_of(model, bias, prefix=""):
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    state[f"{prefix}transformer.h.0.attn.bias"] = torch.ones(1, 1, 12, 12)  # the mask of old PyTorch versions
    return {"model": state, "model_args": SIZES | {"bias": bias}, "iter_num": 7, "best_val_loss": torch.tensor(1.5)}


@pytest.fixture(params=[True, False], ids=["bias", "no bias"])
def nanogpt(request):
    torch.manual_seed(0)
    model = NanoGPT(request.param)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, request.param


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod."])
def test_logits_are_those_of_nanogpt(tmp_path, nanogpt, prefix):
    model, bias = nanogpt
    torch.save(checkpoint_of(model, bias, prefix), tmp_path / "ckpt.pt")
    checkpoint = torch.load(tmp_path / "ckpt.pt", map_location="cpu", weights_only=True)
    converted = load_nanogpt(checkpoint)
    assert not converted.training
    assert converted.config.dropout == 0.1
    ids = torch.randint(70, (2, 12))
    with torch.no_grad():
        expected = model(ids)
        torch.testing.assert_close(converted(ids), expected, atol=5e-3, rtol=0)  # another GELU
    assert expected.std() > 0.5


def test_the_checkpoint_keeps_its_values_when_the_model_is_trained(nanogpt):
    checkpoint = checkpoint_of(*nanogpt)
    with torch.no_grad():
        for parameter in load_nanogpt(checkpoint).parameters():
            parameter.zero_()
    assert checkpoint["model"]["transformer.h.0.mlp.c_fc.weight"].any()


def tied(tensor):
    return {"transformer.wte.weight": tensor, "lm_head.weight": tensor}


def without(name):
    return lambda checkpoint: checkpoint["model"].pop(name)


INVALID = {
    "a state dict": lambda checkpoint: checkpoint["model"],
    "no sizes": lambda checkpoint: {"model": checkpoint["model"]},
    "a list": lambda checkpoint: [checkpoint],
    "a size is missing": lambda checkpoint: checkpoint["model_args"].pop("n_head"),
    "heads do not fit": lambda checkpoint: checkpoint["model_args"].update(n_head=3),
    "a text for a size": lambda checkpoint: checkpoint["model_args"].update(n_layer="2"),
    "fewer layers": lambda checkpoint: checkpoint["model_args"].update(n_layer=1),
    "more layers": lambda checkpoint: checkpoint["model_args"].update(n_layer=3),
    "another vocabulary": lambda checkpoint: checkpoint["model_args"].update(vocab_size=71),
    "another width": lambda checkpoint: checkpoint["model_args"].update(n_embd=32),
    "no embedding": without("transformer.wte.weight"),
    "no bias": without("transformer.h.1.ln_2.bias"),
    "an untied head": lambda checkpoint: checkpoint["model"].update({"lm_head.weight": torch.ones(70, 16)}),
    "NaN": lambda checkpoint: checkpoint["model"]["transformer.wpe.weight"].fill_(torch.nan),
    "not a tensor": lambda checkpoint: checkpoint["model"].update({"transformer.wpe.weight": [1.0]}),
    "a vector as embedding": lambda checkpoint: checkpoint["model"].update(tied(torch.ones(70))),
    "a number as embedding": lambda checkpoint: checkpoint["model"].update(tied(torch.ones(()))),
    "four dimensions": lambda checkpoint: checkpoint["model"].update(tied(torch.ones(1, 1, 70, 16))),
    "an unknown weight": lambda checkpoint: checkpoint["model"].update({"transformer.wxe.weight": torch.ones(1)}),
}


@pytest.mark.parametrize("change", INVALID)
def test_an_invalid_checkpoint_is_an_error(change):
    checkpoint = checkpoint_of(NanoGPT(bias=True), bias=True)
    changed = INVALID[change](checkpoint)
    with pytest.raises(ModelError):
        load_nanogpt(changed if change in ("a state dict", "no sizes", "a list") else checkpoint)
