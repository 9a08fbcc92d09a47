"""Several optimizers as one."""

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from homebrew.errors import ConfigError


class CombinedOptimizer(torch.optim.Optimizer):
    """Several optimizers for different parameters of a model, with the interface of one optimizer.

    Each member keeps its own parameter groups and state. The combined optimizer presents them as its own.

    Args:
        optimizers: Optimizers without common parameters.

    Raises:
        ConfigError: A parameter is in two optimizers.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self.optimizers: list[torch.optim.Optimizer] = []
        groups = list(chain.from_iterable(optimizer.param_groups for optimizer in optimizers))
        super().__init__(groups, {})
        self.defaults = {"foreach": True}  # for zero_grad: one kernel for all gradients
        self.optimizers = list(optimizers)
        self.state = _States(self.optimizers)  # type: ignore[assignment]  # a mapping with the same methods
        parameters = [id(parameter) for group in groups for parameter in group["params"]]
        if len(set(parameters)) < len(parameters):
            raise ConfigError("The optimizers have a parameter in common. Give each parameter to one optimizer.")

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizers' parameter groups, in order."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        """Do nothing. This setter exists because PyTorch's constructor sets an empty list."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Reject the group, because it is not known which optimizer it is for. PyTorch's constructor may add groups.

        Raises:
            ConfigError: The optimizers have already been combined.
        """
        if self.optimizers:
            raise ConfigError("A combined optimizer cannot add a parameter group. Add it to one of the optimizers.")
        super().add_param_group(param_group)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # noqa: ANN401 - as in PyTorch
        """Let each optimizer take a step; return the closure's result."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Let each optimizer load its part of a `state_dict`. State that belongs to no parameter is kept."""
        groups = iter(state_dict["param_groups"])
        for optimizer in self.optimizers:
            own = list(islice(groups, len(optimizer.param_groups)))
            indices = {index for group in own for index in group["params"]}
            state = {key: values for key, values in optimizer.state.items() if not isinstance(key, Tensor)}
            state |= {index: values for index, values in state_dict["state"].items() if index in indices}
            optimizer.load_state_dict({"state": state, "param_groups": own})


class _States(MutableMapping[Any, Any]):
    """The states of several optimizers as one mapping. Parameters without state are not in the mapping."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._optimizers = optimizers

    def __getitem__(self, key: Any) -> Any:  # noqa: ANN401 - a parameter and its state
        return self._containing(key)[key]

    def __setitem__(self, key: Any, value: Any) -> None:  # noqa: ANN401
        for optimizer in self._optimizers:
            if any(key is parameter for parameter in parameters_of(optimizer)):
                optimizer.state[key] = value

    def __delitem__(self, key: Any) -> None:  # noqa: ANN401
        del self._containing(key)[key]

    def __iter__(self) -> Iterator[Any]:
        return chain.from_iterable(optimizer.state for optimizer in self._optimizers)

    def __len__(self) -> int:
        return sum(len(optimizer.state) for optimizer in self._optimizers)

    def _containing(self, key: Any) -> MutableMapping[Any, Any]:  # noqa: ANN401
        for optimizer in self._optimizers:
            if key in optimizer.state:  # a lookup would create the state
                return optimizer.state
        raise KeyError(key)


def combine(optimizers: Sequence[torch.optim.Optimizer]) -> torch.optim.Optimizer:
    """Return a combined optimizer, or the optimizer itself if the sequence has only one."""
    return optimizers[0] if len(optimizers) == 1 else CombinedOptimizer(optimizers)


def members(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """Return the members of a combined optimizer, or a list with any other optimizer itself."""
    return optimizer.optimizers if isinstance(optimizer, CombinedOptimizer) else [optimizer]


def parameters_of(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """Yield the parameters of all groups of an optimizer, in order."""
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def class_names(optimizer: torch.optim.Optimizer) -> str:
    """Return the name of an optimizer's class, or the different class names of a combined optimizer, for messages."""
    return " and ".join(dict.fromkeys(type(member).__name__ for member in members(optimizer)))


def has_modes(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimizer has `train()` and `eval()`, as schedule-free optimizers do."""
    return all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))
