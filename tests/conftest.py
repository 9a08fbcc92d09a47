"""What every test starts from."""

import contextlib
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

# A shell's background jobs, and so their children, are started deaf to Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def fresh_accelerate(monkeypatch):
    """Accelerate's singletons, its environment and PyTorch's precision as in a new process, and one thread."""
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "FSDP_")):
            monkeypatch.delenv(name)
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    torch.set_float32_matmul_precision("highest")  # which a Trainer lowers where there is a GPU
    torch.set_num_threads(1)  # the models are tiny


@pytest.fixture(scope="session")
def bounded_memory():
    """A context in which the process can take 256 MiB more than it has: beyond, allocations fail."""

    @contextlib.contextmanager
    def bounded():
        usual = resource.getrlimit(resource.RLIMIT_AS)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**28, usual[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, usual)

    return bounded
