"""Errors for arguments that do not exist. They suggest names, also for the argument names of other programs."""

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import ParamSpec, TypeVar

from homebrew.errors import ArgumentError
from homebrew.training.argument_names import ADVICE, OTHER_ARGUMENTS, OTHER_NAMES

P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C")


def explain_unknown_arguments(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function raise ArgumentError, with a suggestion, for keyword arguments that it does not have."""
    names = [name for name in inspect.signature(function).parameters if name != "self"]

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        if unknown := [name for name in kwargs if name not in names]:
            called = function.__qualname__.removesuffix(".__init__")
            raise ArgumentError(" ".join(_explain(called, name, names) for name in unknown))
        return function(*args, **kwargs)

    return checked


def explain_unknown_fields(config: type[C]) -> type[C]:
    """Like `explain_unknown_arguments`, for the fields of a dataclass."""
    config.__init__ = explain_unknown_arguments(config.__init__)  # type: ignore[method-assign]
    return config


def similar_names(name: str, names: Sequence[str], other_names: Mapping[str, str]) -> list[str]:
    """Return the `names` that other programs call `name` or, if there are none, those with a similar spelling.

    Args:
        name: Name that does not exist.
        names: Names that exist.
        other_names: Their names in other programs, separated by spaces.
    """
    meant = [known for known in names if name in other_names.get(known, "").split()]
    return meant or difflib.get_close_matches(name, names, n=2)


def _explain(called: str, name: str, names: Sequence[str]) -> str:
    if name in ADVICE:
        advice = ADVICE[name]
    elif similar := similar_names(name.lower(), names, OTHER_NAMES | OTHER_ARGUMENTS):
        advice = f"Did you mean {' or '.join(similar)}?"
    else:
        advice = f"The arguments are {', '.join(names)}."
    return f"{called} has no argument {name!r}. {advice}"
