"""Fixtures of the operations' tests."""

import sys

import pytest
import torch
import torch_kernels

from homebrew.model.ops import chunked_loss, mlp


@pytest.fixture(autouse=True)
def _no_compiled_code():
    """Let each test compile anew, because Dynamo limits how often a function is compiled in a process."""
    torch.compiler.reset()


@pytest.fixture
def kernels_on_cpu(monkeypatch):
    """Let the operations call their kernels on a CPU too, in PyTorch instead of Triton."""
    monkeypatch.setitem(sys.modules, "homebrew.model.ops.triton_kernels", torch_kernels)
    for module in (chunked_loss, mlp):
        monkeypatch.setattr(module, "uses_triton", lambda x: True)
