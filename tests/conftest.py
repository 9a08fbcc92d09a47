"""What every test starts from."""

import os
import signal

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

# A shell's background jobs, and so their children, are started deaf to Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def fresh_accelerate(monkeypatch):
    """Accelerate's singletons and environment as in a new process, and one thread: the models are tiny."""
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "FSDP_")):
            monkeypatch.delenv(name)
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    torch.set_num_threads(1)
