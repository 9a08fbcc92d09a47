"""Tests of each attention implementation against the definition in float64."""

import functools

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import _cur_sdpa_kernel_backends

from homebrew.model.ops import attention
from homebrew.model.ops.attention import causal_attention


def reference_attention(q, k, v):
    """Loop over positions, each of which attends to itself and earlier positions."""
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
@pytest.mark.parametrize("max_unfused_length", [0, 256], ids=["fused", "unfused"])
@pytest.mark.parametrize("training", [True, False])
def test_output_and_gradients_match_the_definition(monkeypatch, length, max_unfused_length, training):
    monkeypatch.setattr(attention, "MAX_UNFUSED_CPU_LENGTH", max_unfused_length)
    generator = torch.Generator().manual_seed(length)
    inputs = [torch.randn(2, 3, length, 8, generator=generator).bfloat16() for _ in range(3)]
    expected = outputs_and_gradients(reference_attention, [x.double() for x in inputs])
    dropout = 0.0 if training else 0.5  # ignored outside of training
    attend = functools.partial(causal_attention, dropout=dropout, training=training)
    for actual, true in zip(outputs_and_gradients(attend, inputs), expected, strict=True):
        torch.testing.assert_close(actual.double(), true, atol=0.02 * true.abs().max().item() + 1e-6, rtol=0)


def test_unfused_attention_applies_dropout():
    x = torch.ones(1, 1, 64, 4, dtype=torch.bfloat16)
    torch.manual_seed(0)
    out = causal_attention(x, x, x, dropout=0.5, training=True)
    assert out.float().std() > 0.01
    assert torch.allclose(causal_attention(x, x, x, dropout=0.5, training=False).float(), x.float(), atol=0.01)


@pytest.fixture
def fused_calls(monkeypatch):
    """Return the order of preference of PyTorch's backends in each call of its fused attention so far."""
    calls, fused = [], F.scaled_dot_product_attention

    def record(*args, **kwargs):
        calls.append(_cur_sdpa_kernel_backends(with_priority=True))
        return fused(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    return calls


@pytest.mark.parametrize(
    ("dtype", "length", "device", "is_fused"),
    [
        (torch.bfloat16, 9, "cpu", False),
        (torch.bfloat16, 10, "cpu", True),
        (torch.float32, 9, "cpu", True),
        (torch.bfloat16, 9, "meta", True),  # stands for any other device
    ],
)
def test_only_short_bfloat16_sequences_on_a_cpu_are_not_fused(
    monkeypatch, fused_calls, dtype, length, device, is_fused
):
    monkeypatch.setattr(attention, "MAX_UNFUSED_CPU_LENGTH", 9)
    x = torch.ones(1, 1, length, 4, dtype=dtype, device=device)
    causal_attention(x, x, x, dropout=0.0, training=True)
    assert len(fused_calls) == is_fused


def test_only_training_changes_the_preferred_backends(fused_calls):
    x = torch.ones(1, 1, 3, 4)
    for training in (True, False):
        causal_attention(x, x, x, dropout=0.0, training=training)
    default = _cur_sdpa_kernel_backends(with_priority=True)
    assert fused_calls == [attention.TRAINING_ATTENTION, default]
    assert default != attention.TRAINING_ATTENTION


def test_unfused_attention_ignores_the_default_device():
    x = torch.ones(1, 1, 3, 4, dtype=torch.bfloat16)
    with torch.device("meta"):
        assert causal_attention(x, x, x, dropout=0.0, training=False).device.type == "cpu"
