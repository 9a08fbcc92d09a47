"""A context manager for passes of a model that leave no trace."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from homebrew.model.eval_mode import eval_mode


@contextmanager
def trial(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode, and restore its modes and buffers and the random states on exit.

    Inside, the mode may be changed. Gradients are the caller's.
    """
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    with eval_mode(model), torch.random.fork_rng(devices):
        try:
            yield
        finally:
            with torch.no_grad():
                for module, name, buffer, value in buffers:
                    module._buffers[name] = buffer  # forward may have assigned a new tensor
                    if not buffer.equal(value):  # expanded ones cannot be written to
                        buffer.copy_(value)
