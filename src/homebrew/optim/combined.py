"""Several optimizers as one."""

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch

from homebrew.errors import ConfigError


class CombinedOptimizer(torch.optim.Optimizer):
    """Optimizers that share a model's parameters, behind the interface of one.

    Its parameter groups are theirs, in order, and its state is shared with them.

    Args:
        optimizers: Optimizers, no two of which have a parameter in common.

    Raises:
        ConfigError: A parameter is in two optimizers.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self.optimizers = list(optimizers)
        try:
            super().__init__(chain.from_iterable(o.param_groups for o in optimizers), {})  # keeps their dictionaries
        except ValueError as error:
            raise ConfigError(
                f"The optimizers cannot be combined: {error}. Give each parameter to one optimizer."
            ) from error
        for optimizer in optimizers:
            self.state.update(optimizer.state)
        self._share()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # noqa: ANN401 - as in PyTorch
        """Let each optimizer take a step; return the closure's result."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned."""
        super().load_state_dict(dict(state_dict))  # replaces the state and the groups
        self._share()

    def _share(self) -> None:
        """Give the optimizers this one's state and groups."""
        groups = iter(self.param_groups)
        for optimizer in self.optimizers:
            optimizer.state = self.state
            optimizer.param_groups = [next(groups) for _ in optimizer.param_groups]


def combine(optimizers: Sequence[torch.optim.Optimizer]) -> torch.optim.Optimizer:
    """Return a combined optimizer, or the only one of the sequence."""
    return optimizers[0] if len(optimizers) == 1 else CombinedOptimizer(optimizers)


def members(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """Return the optimizers of a combined one, or a list of the optimizer itself."""
    return optimizer.optimizers if isinstance(optimizer, CombinedOptimizer) else [optimizer]
