"""Errors for arguments that do not exist. They suggest names, also for the argument names of other programs."""

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

from homebrew.errors import ArgumentError

P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C")


@dataclass(frozen=True)
class ArgumentNames:
    """Names of arguments in other programs. The methods decorate the functions that take the arguments."""

    other_names: Mapping[str, str] = field(default_factory=dict)
    """Each argument's names in other programs, separated by spaces."""
    advice: Mapping[str, str] = field(default_factory=dict)
    """Advice for arguments of other programs that have no direct counterpart."""

    def explain_unknown_arguments(self, function: Callable[P, R]) -> Callable[P, R]:
        """Make a function raise ArgumentError, with a suggestion, for keyword arguments that it does not have."""
        names = [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]

        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            if unknown := [name for name in kwargs if name not in names]:
                called = function.__qualname__.removesuffix(".__init__")
                raise ArgumentError(" ".join(self._explain(called, name, names) for name in unknown))
            return function(*args, **kwargs)

        return checked

    def explain_unknown_fields(self, config: type[C]) -> type[C]:
        """Like `explain_unknown_arguments`, for the fields of a dataclass."""
        config.__init__ = self.explain_unknown_arguments(config.__init__)  # type: ignore[method-assign]
        return config

    def _explain(self, called: str, name: str, names: Sequence[str]) -> str:
        if name in self.advice:
            advice = self.advice[name]
        elif similar := similar_names(name.lower(), names, self.other_names):
            advice = f"Did you mean {' or '.join(similar)}?"
        else:
            advice = f"The arguments are {', '.join(names)}."
        return f"{called} has no argument {name!r}. {advice}"


def similar_names(name: str, names: Sequence[str], other_names: Mapping[str, str]) -> list[str]:
    """Return the `names` that other programs call `name` or, if there are none, those with a similar spelling."""
    meant = [known for known in names if name in other_names.get(known, "").split()]
    return meant or difflib.get_close_matches(name, names, n=2)
