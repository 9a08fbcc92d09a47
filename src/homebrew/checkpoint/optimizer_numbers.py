"""What an optimizer keeps besides tensors: plain numbers, of each parameter and of its groups."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from homebrew.errors import CorruptCheckpoint

_NOT_KEPT = ("params", "lr")
"""Of a group: the parameters, and what the schedule says anew at every step."""


class OptimizerNumbers:
    """An optimizer's plain numbers as JSON: step counts, say, or an estimated step size.

    Of a group those count that the optimizer has changed; its settings are the run's own.

    Args:
        model: the bare model, whose names are used.
        optimizer: before its first step.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._model = model
        self._optimizer = optimizer
        self._settings = [_remembered(group) for group in optimizer.param_groups]

    def state(self) -> tuple[dict[str, Any], list[str]]:
        """The numbers, and the names of what cannot be kept.

        That is what is neither a number nor a tensor, if a parameter has it, or a group and the optimizer has changed
        it; and a group's tensors.
        """
        parameters, groups, lost = {}, [], []
        for name, parameter in self._model.named_parameters():
            values = self._optimizer.state.get(parameter, {})
            parameters[name] = {key: value for key, value in values.items() if _is_number(value)}
            lost += [key for key, value in values.items() if not (_is_number(value) or _is_kept_elsewhere(value))]
        for group, settings in zip(self._optimizer.param_groups, self._settings, strict=True):
            changed = {key: group[key] for key, value in _remembered(group).items() if value != settings.get(key)}
            groups.append({key: value for key, value in changed.items() if _is_number(value)})
            lost += [key for key, value in changed.items() if not _is_number(value)]
            lost += [key for key, value in group.items() if key not in _NOT_KEPT and isinstance(value, Tensor)]
        return {
            "parameters": {name: numbers for name, numbers in parameters.items() if numbers},
            "groups": groups,
        }, list(dict.fromkeys(lost))

    def check(self, state: object, path: Path) -> None:
        """Refuse what `state` did not return for such an optimizer.

        Args:
            state: any JSON value.
            path: where it is from, for messages.

        Raises:
            CorruptCheckpoint: it is something else.
        """
        state = state if isinstance(state, dict) else {}
        parameters, groups = state.get("parameters"), state.get("groups")
        names = {name for name, _ in self._model.named_parameters()}
        if not (
            isinstance(parameters, dict)
            and parameters.keys() <= names
            and isinstance(groups, list)
            and len(groups) == len(self._settings)
            and all(isinstance(values, dict) for values in (*groups, *parameters.values()))
            and all(_is_number(number) for values in (*groups, *parameters.values()) for number in values.values())
            and not any(key in values for values in groups for key in _NOT_KEPT)
        ):
            raise CorruptCheckpoint(
                f"{path} does not hold the numbers that this run's optimizer keeps: was it another?"
            )

    def restore(self, state: Mapping[str, Any]) -> None:
        """Put back what `check` has let pass."""
        named = dict(self._model.named_parameters())
        for name, numbers in state["parameters"].items():
            self._optimizer.state[named[name]].update(numbers)
        for group, numbers in zip(self._optimizer.param_groups, state["groups"], strict=True):
            group.update(numbers)


def _remembered(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group's settings, so that a change is seen: of what can change in place, what it looks like.

    Tensors are left out: they may be large, and on a GPU. A tuple is as a list, which PyTorch makes of it on a resume.
    """
    return {
        key: value if _is_number(value) else repr(list(value) if isinstance(value, tuple) else value)
        for key, value in group.items()
        if key not in _NOT_KEPT and not isinstance(value, Tensor)
    }


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def _is_kept_elsewhere(value: object) -> bool:
    return value is None or isinstance(value, Tensor)
