"""Help texts of options, which are the docstrings of a command's fields."""

import ast
import dataclasses
import inspect
import textwrap
import typing
from itertools import pairwise
from types import MappingProxyType


def set_help_texts(command: type) -> None:
    """Make the docstring of each field its help text, in one line that is wrapped to the width of the terminal.

    tyro also reads these docstrings, but keeps a line break before every indented line.
    """
    texts: dict[str, str] = {}
    for base in reversed(command.__mro__):
        texts |= _field_docstrings(base) if dataclasses.is_dataclass(base) else {}
    types = typing.get_type_hints(command)
    for field in dataclasses.fields(command):
        if field.name in texts:
            field.metadata = MappingProxyType({**field.metadata, "help": texts[field.name]})
        if dataclasses.is_dataclass(kind := types[field.name]):
            set_help_texts(typing.cast("type", kind))


def _field_docstrings(dataclass: type) -> dict[str, str]:
    try:
        [definition] = ast.parse(textwrap.dedent(inspect.getsource(dataclass))).body
    except OSError:  # an installation without source files
        return {}
    docstrings = {}
    for statement, following in pairwise(typing.cast("ast.ClassDef", definition).body):
        match statement, following:
            case ast.AnnAssign(target=ast.Name(name)), ast.Expr(value=ast.Constant(str(text))):
                docstrings[name] = " ".join(text.split())
    return docstrings
