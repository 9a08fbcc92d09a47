"""What every test starts from."""

import os

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState


@pytest.fixture(autouse=True)
def fresh_accelerate(monkeypatch):
    """Accelerate's singletons and environment as in a new process, and one thread: the models are tiny."""
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "FSDP_")):
            monkeypatch.delenv(name)
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    torch.set_num_threads(1)
