"""Context managers for forward passes outside of training: in evaluation mode, uncompiled, or as a trial.

A trial leaves the model and the random states as they were.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class _OpenContexts:
    """The contexts of one module that have not ended."""

    modes: dict[nn.Module, bool]
    """Whether each submodule was in training mode before the first context."""
    count: int = 0


_open_contexts: dict[nn.Module, _OpenContexts] = {}


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Put a module in evaluation mode, and restore the previous mode of each submodule on exit.

    Contexts of a module may overlap, for example during two text streams. The end of the last one restores the modes.
    """
    contexts = _open_contexts.setdefault(module, _OpenContexts({m: m.training for m in module.modules()}))
    contexts.count += 1
    module.eval()
    try:
        yield
    finally:
        contexts.count -= 1
        if contexts.count == 0:
            del _open_contexts[module]
            for submodule, is_training in contexts.modes.items():  # parents first: train() also sets the children
                if submodule.training != is_training:
                    submodule.train(is_training)


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Run a model without compilation, even if the model or some of its modules are compiled in place.

    Use this for shapes that do not occur in training, since each new shape would be compiled first.
    """
    calls = {m: m._compiled_call_impl for m in model.modules() if m._compiled_call_impl is not None}
    for module in calls:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in calls.items():
            module._compiled_call_impl = call


@contextmanager
def trial(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode, and restore its modes and buffers and the random states on exit.

    The block may change the mode. Gradients are not restored.
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
                    if not buffer.equal(value):  # an expanded buffer cannot be written to
                        buffer.copy_(value)
