"""A context manager for evaluation mode."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

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

    Contexts of a module may overlap, as those of two text streams do: the modes are restored when the last one ends.
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
