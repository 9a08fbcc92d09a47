"""Fixtures of the training tests."""

import pytest
import torch


@pytest.fixture
def deterministic(monkeypatch):
    """Use deterministic kernels on a GPU, whose fastest ones sum in an order that varies between runs."""
    if not torch.cuda.is_available():
        yield
        return
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
