"""How options of type `Path` are parsed."""

from pathlib import Path
from typing import Any

from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from homebrew.errors import HomebrewError

PATHS = ConstructorRegistry()
"""Rejects empty paths, which `Path` would turn into the current folder."""


@PATHS.primitive_rule
def _non_empty_path(type_info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    if type_info.type is not Path:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda arguments: _parse(arguments[0]),
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda path: [str(path)],
    )


def _parse(argument: str) -> Path:
    if not argument:
        # Not a ConfigError, which is a ValueError: tyro would catch it and print the usage.
        raise HomebrewError("A path is an empty string. Give a path; the current folder is '.'.")
    return Path(argument)
