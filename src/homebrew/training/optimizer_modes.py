"""Optimizers with train and eval modes: schedule-free ones and `AveragedOptimizer`, which evaluate other weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from homebrew.optim.combined import has_modes, members, parameters_of

_TRAIN_WEIGHT = "train_mode_weight"
"""Key of a parameter's state: its weight in training mode, while the optimizer is in evaluation mode."""


class OptimizerModes:
    """Calls an optimizer's `train()` and `eval()`, if it has both, which replace the model's weights.

    Switching there and back would change the weights by rounding. Therefore, in evaluation mode the weights of training
    mode are kept in the optimizer's state. They are saved with it, so that a run resumes with exactly these weights. A
    new run does not use them: it starts from the weights that the model has.

    Args:
        optimizer: Any optimizer, which is put in evaluation mode; for one without modes nothing is done. Weights that
            an earlier run has kept are dropped.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizers: list[Any] = [
            member for member in dict.fromkeys([optimizer, *members(optimizer)]) if has_modes(member)
        ]
        self._is_training = False
        for member in self._optimizers:
            member.eval()
            for parameter in parameters_of(member):
                member.state.get(parameter, {}).pop(_TRAIN_WEIGHT, None)

    @torch.no_grad()
    def train(self) -> None:
        """Switch to the weights to train."""
        self._is_training = bool(self._optimizers)
        for optimizer in self._optimizers:
            optimizer.train()
            for parameter in parameters_of(optimizer):
                weight = optimizer.state.get(parameter, {}).pop(_TRAIN_WEIGHT, None)
                if weight is not None:
                    parameter.copy_(weight)

    @torch.no_grad()
    def eval(self) -> None:
        """Switch to the weights to evaluate and save."""
        if not self._is_training:
            return
        for optimizer in self._optimizers:
            for parameter in parameters_of(optimizer):
                # A parameter without state has had no gradient, and some optimizers cannot load a part of their state.
                if state := optimizer.state.get(parameter):
                    state[_TRAIN_WEIGHT] = parameter.detach().clone()
            optimizer.eval()
        self._is_training = False

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Use the weights to evaluate and save in this block."""
        was_training = self._is_training
        self.eval()
        try:
            yield
        finally:
            if was_training:
                self.train()
