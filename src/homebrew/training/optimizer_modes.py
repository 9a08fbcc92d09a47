"""Optimizers with train and eval modes, such as schedule-free AdamW, whose training and evaluation weights differ."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_TRAIN_WEIGHT = "train_mode_weight"
"""Key of a parameter's state: its weight in training mode, while the optimizer is in evaluation mode."""


class OptimizerModes:
    """Calls an optimizer's `train()` and `eval()`, if it has both, which replace the model's weights.

    Switching there and back would change the weights by rounding. Therefore, in evaluation mode the weights of training
    mode are kept in the optimizer's state. They are saved with it, so that a run resumes with exactly these weights.

    Args:
        optimizer: Any optimizer, which is put in evaluation mode; for one without modes nothing is done.
    """

    def __init__(self, optimizer: Any) -> None:  # noqa: ANN401 - an optimizer, perhaps with modes
        self._optimizer = optimizer
        self._has_modes = all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))
        self._is_training = False
        if self._has_modes:
            optimizer.eval()

    @torch.no_grad()
    def train(self) -> None:
        """Switch to the weights to train."""
        if not self._has_modes:
            return
        self._optimizer.train()
        self._is_training = True
        for parameter in self._parameters():
            weight = self._optimizer.state.get(parameter, {}).pop(_TRAIN_WEIGHT, None)
            if weight is not None:
                parameter.copy_(weight)

    @torch.no_grad()
    def eval(self) -> None:
        """Switch to the weights to evaluate and save."""
        if not self._is_training:
            return
        for parameter in self._parameters():
            self._optimizer.state[parameter][_TRAIN_WEIGHT] = parameter.detach().clone()
        self._optimizer.eval()
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

    def _parameters(self) -> Iterator[torch.Tensor]:
        return (parameter for group in self._optimizer.param_groups for parameter in group["params"])
