"""Tests of the Triton kernels against PyTorch. Without a GPU, they run in Triton's interpreter."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from homebrew.model.ops.mlp import mlp

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp"),  # raised by NumPy in the interpreter
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the tests below run in this process")
def test_kernels_in_triton_interpreter():
    """Run this module in a subprocess, because Triton reads TRITON_INTERPRET when it is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-m", "pytest", __file__], env=environment, check=True, timeout=200)


needs_kernels = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="runs in the interpreter")


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "columns", "vocab_size", "block"), [(5, 128, 65, 4096), (7, 384, 300, 128), (4, 128, 1, 64)]
)
@pytest.mark.parametrize("all_ignored", [False, True])
def test_cross_entropy_matches_pytorch(monkeypatch, rows, columns, vocab_size, block, dtype, all_ignored):
    from homebrew.model.ops import triton_kernels as kernels

    monkeypatch.setattr(kernels, "LOSS_BLOCK", block)
    generator = torch.Generator().manual_seed(rows)
    logits = (3 * torch.randn(rows, columns, generator=generator)).to(DEVICE, dtype)
    targets = torch.randint(0, vocab_size, (rows,), generator=generator).to(DEVICE)
    targets[slice(None) if all_ignored else 1] = -100
    reference = logits[:, :vocab_size].float().requires_grad_()
    expected = F.cross_entropy(reference, targets, ignore_index=-100, reduction="sum")
    expected.backward()

    before = logits.clone()
    total = kernels.cross_entropy_inplace(logits, targets, vocab_size, False, -100)
    torch.testing.assert_close(total, expected.detach())
    assert torch.equal(logits, before)
    total = kernels.cross_entropy_inplace(logits, targets, vocab_size, True, -100)
    torch.testing.assert_close(total, expected.detach())
    torch.testing.assert_close(logits[:, :vocab_size], reference.grad.to(dtype))
    assert not logits[:, vocab_size:].any()


@needs_kernels
def test_cross_entropy_of_an_id_outside_the_vocabulary_is_infinite():
    from homebrew.model.ops import triton_kernels as kernels

    for target in (65, 100, 128, -1):
        logits = torch.zeros(1, 128, device=DEVICE)
        assert kernels.cross_entropy_inplace(logits, torch.tensor([target], device=DEVICE), 65, True, -100).isinf()


@needs_kernels
@pytest.mark.parametrize("shape", [(1, 1), (33, 300), (600, 256), (6, 2050)])
def test_gelu_and_gradient_match_pytorch(shape):
    from homebrew.model.ops import triton_kernels as kernels

    generator = torch.Generator().manual_seed(shape[0])
    x = (4 * torch.randn(shape, generator=generator)).to(DEVICE).requires_grad_()
    bias = torch.randn(shape[1], generator=generator).to(DEVICE)
    d_y = torch.randn(shape, generator=generator).to(DEVICE)
    y = F.gelu(x + bias, approximate="tanh")
    y.backward(d_y)
    recomputed, d_x, sums = kernels.gelu_backward(x.detach(), bias, d_y)
    torch.testing.assert_close(kernels.gelu(x.detach(), bias), y.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(recomputed, y.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(d_x, x.grad, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sums, x.grad.sum(0), atol=1e-3, rtol=1e-4)


@needs_kernels
def test_gelu_of_large_inputs():
    from homebrew.model.ops import triton_kernels as kernels

    x = torch.tensor([[-1e4, -50.0, 50.0, 1e4]], device=DEVICE)
    y, d_x, _ = kernels.gelu_backward(x, torch.zeros_like(x[0]), torch.ones_like(x))
    assert y.tolist() == [[0.0, 0.0, 50.0, 1e4]]
    assert d_x.tolist() == [[0.0, 0.0, 1.0, 1.0]]


@needs_kernels
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("frozen", ["", "w_in b_in w_out b_out", "x w_in b_in"])
def test_fused_mlp_matches_pytorch(monkeypatch, compiled, half, frozen):
    monkeypatch.setattr("homebrew.model.ops.mlp.uses_triton", lambda x: True)
    generator = torch.Generator().manual_seed(0)
    shapes = [(33, 16), (64, 16), (64,), (16, 64), (16,)]
    inputs = [torch.randn(s, generator=generator).to(DEVICE).requires_grad_() for s in shapes]
    x, w_in, b_in, w_out, b_out = inputs
    d_y = torch.randn(33, 16, generator=generator).to(DEVICE)
    for name, tensor in zip(("x", "w_in", "b_in", "w_out", "b_out"), inputs, strict=True):
        tensor.requires_grad = name not in frozen.split()
    y = F.linear(F.gelu(F.linear(x, w_in, b_in), approximate="tanh"), w_out, b_out)
    expected = (y, *torch.autograd.grad(y, [t for t in inputs if t.requires_grad], d_y))

    fused = torch.compile(mlp, fullgraph=True, backend="aot_eager") if compiled else mlp
    if half:
        inputs[0] = x.detach().bfloat16().requires_grad_(x.requires_grad)
    y = fused(*inputs)
    actual = (y, *torch.autograd.grad(y, [t for t in inputs if t.requires_grad], d_y.to(y.dtype)))
    for a, b in zip(actual, expected, strict=True):
        assert (a.float() - b).norm() < (2e-2 if half else 1e-4) * b.norm()
