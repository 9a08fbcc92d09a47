"""Run the `main` function of a script from the command line."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import tyro

from homebrew.errors import HomebrewError

T = TypeVar("T")


def run_script(main: Callable[[T], None], options: type[T]) -> None:
    """Parse the command line, and call `main` with the options. A wrong setting or path gives no traceback."""
    try:
        main(tyro.cli(options))
    except (HomebrewError, OSError) as error:
        raise SystemExit(f"{Path(sys.argv[0]).name}: {error}") from None
