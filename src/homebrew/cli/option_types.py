"""Rules for parsing option types, in place of tyro's own rules."""

import dataclasses
import typing
from pathlib import Path
from types import NoneType
from typing import Any

from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    UnsupportedTypeAnnotationError,
)

from homebrew.errors import HomebrewError

OPTION_TYPES = ConstructorRegistry()
"""Rules that come before those of tyro."""


@OPTION_TYPES.primitive_rule
def _optional(type_info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | UnsupportedTypeAnnotationError | None:
    """Parse the type `X | None` as `X`: only the default can be None, so None must not be among the choices."""
    kinds = typing.get_args(type_info.type)
    if NoneType not in kinds:
        return None
    given: Any = typing.Union[tuple(kind for kind in kinds if kind is not NoneType)]  # noqa: UP007 - `|` takes no tuple
    spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(given, type_info.markers))
    if isinstance(spec, UnsupportedTypeAnnotationError):
        return spec

    def parse(words: list[str]) -> Any:  # noqa: ANN401 - of any type
        try:
            return spec.instance_from_str(words)
        except ValueError:  # tyro's message names Python types
            raise ValueError(f"{' '.join(words)!r} is not of the form {spec.metavar}") from None

    return dataclasses.replace(
        spec,
        instance_from_str=parse,
        is_instance=lambda value: value is None or spec.is_instance(value),
        str_from_instance=lambda value: ["None"] if value is None else spec.str_from_instance(value),
    )


@OPTION_TYPES.primitive_rule
def _non_empty_path(type_info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Reject empty paths, which `Path` would turn into the current folder."""
    if type_info.type is not Path:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda arguments: _parse_path(arguments[0]),
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda path: [str(path)],
    )


def _parse_path(argument: str) -> Path:
    if not argument:
        # Not a ConfigError, which is a ValueError: tyro would catch it and print the usage.
        raise HomebrewError("A path is an empty string. Give a path; the current folder is '.'.")
    return Path(argument)
