"""Every way attention is computed against the definition, in float64."""

import pytest
import torch

from homebrew.model.ops import attention
from homebrew.model.ops.attention import causal_attention


def defined(q, k, v):
    """A loop over positions: each attends to itself and those before it."""
    out = torch.zeros_like(v)
    for t in range(q.shape[2]):
        scores = (q[:, :, t : t + 1] * k[:, :, : t + 1]).sum(-1) / q.shape[-1] ** 0.5  # (B, nh, t + 1)
        out[:, :, t] = (scores.softmax(-1)[..., None] * v[:, :, : t + 1]).sum(2)
    return out


def outputs_and_gradients(function, inputs):
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)
    return out, *torch.autograd.grad((out * weights).sum(), inputs)


@pytest.mark.parametrize("length", [1, 7, 33])
@pytest.mark.parametrize("short", [0, 256], ids=["one kernel", "written out"])
@pytest.mark.parametrize("training", [True, False])
def test_equals_the_definition(monkeypatch, length, short, training):
    monkeypatch.setattr(attention, "SHORT_ON_CPU", short)
    generator = torch.Generator().manual_seed(length)
    inputs = [torch.randn(2, 3, length, 8, generator=generator).bfloat16() for _ in range(3)]
    expected = outputs_and_gradients(defined, [x.double() for x in inputs])
    dropout = 0.0 if training else 0.5  # which acts in training only
    found = outputs_and_gradients(lambda q, k, v: causal_attention(q, k, v, dropout=dropout, training=training), inputs)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=0.02 * theirs.abs().max().item() + 1e-6, rtol=0)


def test_dropout_acts_when_written_out():
    x = torch.ones(1, 1, 64, 4, dtype=torch.bfloat16)
    torch.manual_seed(0)
    out = causal_attention(x, x, x, dropout=0.5, training=True)
    assert out.float().std() > 0.01
    assert torch.allclose(causal_attention(x, x, x, dropout=0.5, training=False).float(), x.float(), atol=0.01)
