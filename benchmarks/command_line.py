"""Command lines of the scripts: options, settings as text, and further processes."""

import ast
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import tyro

from homebrew.errors import ConfigError, HomebrewError

T = TypeVar("T")


def run_script(main: Callable[[T], None], options: type[T]) -> None:
    """Parse the command line, and call `main` with the options. A wrong setting or path gives no traceback."""
    try:
        main(tyro.cli(options))
    except (HomebrewError, OSError) as error:
        raise SystemExit(f"{Path(sys.argv[0]).name}: {error}") from None


def command_of(script: str, **options: Any) -> list[str]:
    """Return the command that runs a script with these options, without those that are None."""
    command = [sys.executable, script]
    for name, value in options.items():
        if value is not None:
            command += [f"--{name.replace('_', '-')}", str(value)]
    return command


def parse_settings(text: str) -> dict[str, Any]:
    """Parse "key=value,key=value". A value that is not a Python literal is a string."""
    text = text.replace(" ", "")
    items = re.findall(r"(\w+)=(\([^()]*\)|[^,()#]+)", text)
    if ",".join(map("=".join, items)) != text or len(dict(items)) < len(items):
        raise ConfigError(f"{text!r} cannot be parsed. Write key=value,key=value, each key once.")
    return {key: _literal(value) for key, value in items}


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text
