"""Memory on a CPU: what one step frees, the next one takes again."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# mallopt(3)'s names, and what it calls large and may leave free before it turns to the system.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_WITHIN = {_M_MMAP_THRESHOLD: 1 << 30, _M_TRIM_THRESHOLD: (1 << 31) - 1}
_AFTERWARDS = {_M_MMAP_THRESHOLD: 32 << 20, _M_TRIM_THRESHOLD: 64 << 20}  # as far as it raises them by itself


@contextmanager
def freed_memory_kept(device: torch.device) -> Iterator[None]:
    """Within it, the C library keeps what is freed, and at the end gives it back.

    A step frees nearly all it has taken. What goes back to the system is taken anew page by page, each of them cleared:
    a tenth of a small model's step. Only on a CPU, and where the C library is glibc.

    Args:
        device: of the run.
    """
    if device.type != "cpu" or sys.platform != "linux" or not hasattr(library := ctypes.CDLL(None), "mallopt"):
        yield
        return
    try:
        for name, value in _WITHIN.items():
            library.mallopt(name, value)
        yield
    finally:
        for name, value in _AFTERWARDS.items():
            library.mallopt(name, value)
        library.malloc_trim(0)
