"""Tests of the Triton kernels against PyTorch. Without a GPU, they run in Triton's interpreter."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

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
    subprocess.run([sys.executable, "-m", "pytest", "-n0", __file__], env=environment, check=True, timeout=200)


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
