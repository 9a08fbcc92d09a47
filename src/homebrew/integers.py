"""Validation of integers that users pass in."""

from numbers import Integral
from typing import TypeGuard

from homebrew.errors import ConfigError, HomebrewError

MAX_INT64 = 2**63 - 1
SEED_RANGE = (-(2**63), 2**64 - 1)
"""Seeds that `torch.Generator.manual_seed` accepts."""


def is_integer(value: object) -> TypeGuard[int]:
    """Return whether a value is an integer of Python or NumPy. Booleans and tensors are not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def as_integer(
    name: str,
    value: object,
    minimum: int = 1,
    maximum: int = MAX_INT64,
    *,
    error: type[HomebrewError] = ConfigError,
) -> int:
    """Return an integer of Python or NumPy, called `name` in messages, as a Python integer.

    Raises:
        HomebrewError: The value is not an integer from `minimum` to `maximum`. The class is `error`.
    """
    if is_integer(value) and minimum <= value <= maximum:
        return int(value)
    limits = f"of at least {minimum} and below 2**63" if maximum == MAX_INT64 else f"from {minimum} to {maximum}"
    raise error(f"{name}={value!r:.100} is not valid. Use an integer {limits}.")
