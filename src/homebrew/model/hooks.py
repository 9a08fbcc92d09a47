"""The hooks that run when a module is called. Code that uses a module's weights without calling it would skip them."""

from collections.abc import Mapping
from typing import Any

from torch import nn


def module_hooks(module: nn.Module) -> list[Mapping[int, Any]]:
    """Return a module's own hooks, by kind. Hooks that are added later are in the same mappings."""
    return [module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks]


def has_global_hooks() -> bool:
    """Return whether there are global hooks, which run for all modules, such as FlopCounterMode's."""
    return bool(nn.modules.module._has_any_global_hook())  # type: ignore[no-untyped-call]
