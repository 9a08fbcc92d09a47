"""Entry point of `homebrew`, `python -m homebrew` and `accelerate launch -m homebrew`."""

import contextlib
import io
import os
import sys
from pathlib import Path

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT, as in shells."""


def run() -> None:
    """Run the command line and exit. Ctrl-C prints no traceback, not even during imports."""
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a model may generate characters that the terminal cannot encode
    try:
        from homebrew.cli.main import main

        code = main()
    except KeyboardInterrupt:
        code = INTERRUPTED
    if code == INTERRUPTED and sys.stderr.isatty():
        with contextlib.suppress(OSError):
            print(file=sys.stderr)  # the terminal has echoed ^C: start the shell's prompt on a new line
    sys.exit(code)


def _open_closed_streams() -> None:
    """Replace streams that the shell has closed (`>&-`), so that no file gets their descriptor."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115 - stays open


if __name__ == "__main__":
    run()
