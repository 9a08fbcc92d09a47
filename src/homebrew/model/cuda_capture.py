"""Captures CUDA graphs safely beside other threads and garbage."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def capture(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream | None = None) -> Iterator[None]:
    """Capture the CUDA work of the context into a graph; nothing runs before the first replay.

    Other threads, such as the checkpoint writer's, may use the GPU meanwhile. Garbage collection is off: destroying an
    old CUDA graph or pinned buffer during a capture invalidates it, and PyTorch does not collect before a capture.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            yield
    finally:
        if was_enabled:
            gc.enable()
