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
    """Accelerate's singletons and environment as in a new process, and one thread: the models are tiny."""
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "FSDP_")):
            monkeypatch.delenv(name)
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    torch.set_num_threads(1)


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
