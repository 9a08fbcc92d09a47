"""Warnings that show the line of the user's code that called homebrew."""

import inspect
import warnings

_SKIPPED = ("homebrew", "contextlib")
"""Packages whose frames are not the user's; contextlib's frames are between two of homebrew's."""


def warn(message: str) -> None:
    """Issue a `UserWarning` at the nearest caller outside homebrew, however deep the call is."""
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _SKIPPED:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)  # noqa: TID251 - the only place
