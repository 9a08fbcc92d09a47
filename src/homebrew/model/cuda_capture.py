"""Captures CUDA graphs so that neither other threads nor garbage collection interfere."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def capture(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream | None = None) -> Iterator[None]:
    """Capture the CUDA work of the context into a graph; nothing runs before the first replay.

    Other threads, such as the checkpoint writer's, may use the GPU meanwhile. Garbage collection is disabled: if it
    destroyed an old CUDA graph or pinned buffer, the capture would be invalid. PyTorch does not collect garbage before
    a capture.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            yield
    finally:
        if was_enabled:
            gc.enable()
