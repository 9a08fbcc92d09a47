"""The optimizer as it was built: state that a checkpoint can omit, and from which a Trainer's second run starts."""

import torch
from accelerate import Accelerator
from torch import nn

from homebrew.checkpoint.optimizer_state import group_numbers, group_settings, initial_state, load_optimizer_state


class BuiltOptimizer:
    """An optimizer as it was before its first step.

    Args:
        model: Model without wrappers.
        optimizer: Optimizer without Accelerate's wrapper, before its first step.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._model = model
        self._optimizer = optimizer
        self._first = self._last = group_numbers(optimizer)
        self.settings = group_settings(optimizer)
        """Result of `group_settings`. A checkpoint has only the settings that differ from these."""
        self.state = initial_state(model, optimizer)
        """Result of `initial_state`. Parameters without state in a checkpoint get this state."""

    def end_run(self) -> None:
        """Record the numbers in the parameter groups, so that `reset` can tell the run's changes from the user's."""
        self._last = group_numbers(self._optimizer)

    def reset(self, accelerator: Accelerator) -> None:
        """Restore the initial state and numbers, except numbers that the user has changed since; collective."""
        numbers = zip(self._first, self._last, group_numbers(self._optimizer), strict=True)
        groups = [{key: first[key] for key in first if last.get(key) == now.get(key)} for first, last, now in numbers]
        state = {"parameters": {}, "groups": groups}
        load_optimizer_state(accelerator, self._model, self._optimizer, {}, state, self.state)
