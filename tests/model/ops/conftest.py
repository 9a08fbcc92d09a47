"""Fixtures of the operations' tests."""

import sys

import pytest
import torch
import torch_kernels

from homebrew.model.ops import chunked_loss, linear, mlp


@pytest.fixture(autouse=True)
def _no_compiled_code():
    """Let each test compile anew, because Dynamo limits how often a function is compiled in a process."""
    torch.compiler.reset()


@pytest.fixture
def kernels_on_cpu(monkeypatch):
    """Let the operations call their kernels on a CPU too, in PyTorch instead of Triton and cuBLASLt."""
    monkeypatch.setitem(sys.modules, "homebrew.model.ops.triton_kernels", torch_kernels)
    monkeypatch.setattr(chunked_loss, "uses_triton", lambda x: True)
    for module in (linear, mlp):
        monkeypatch.setattr(module, "is_tunable", lambda device, dtype: True)
