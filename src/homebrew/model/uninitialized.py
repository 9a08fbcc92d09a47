"""A context in which PyTorch's layers are built without initial weights."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch.overrides import TorchFunctionMode

_INITIALIZERS = ("kaiming_uniform_", "normal_", "uniform_")


class UninitializedWeights(TorchFunctionMode):
    """Builds linear layers and embeddings without drawing weights, for a model that draws its own.

    PyTorch's would take as long again, use the global random state, and, on the meta device, import sympy.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - what the function returns
        """Call a function of PyTorch, unless it draws weights."""
        return None if func.__name__ in _INITIALIZERS else func(*args, **kwargs or {})
