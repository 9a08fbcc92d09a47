"""A context manager for passes without compilation."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Run a model without compilation, although it, or modules of it, are compiled in place.

    For passes of shapes that do not occur in training, each of which would be compiled first.
    """
    calls = {m: m._compiled_call_impl for m in model.modules() if m._compiled_call_impl is not None}
    for module in calls:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in calls.items():
            module._compiled_call_impl = call
