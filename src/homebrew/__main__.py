"""The `homebrew` program: `python -m homebrew`, and `accelerate launch -m homebrew`."""

import contextlib
import io
import sys

INTERRUPTED = 130
"""128 + SIGINT, as shells have it."""


def run() -> None:
    """Do what the command line says; Ctrl-C is quiet from here on, also while all else is imported."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a model may write what this terminal cannot show
    try:
        from homebrew.cli.main import main

        code = main()
    except KeyboardInterrupt:
        code = INTERRUPTED
    if code == INTERRUPTED and sys.stderr.isatty():
        with contextlib.suppress(OSError):
            print(file=sys.stderr)  # the shell's next prompt does not belong beside ^C
    sys.exit(code)


if __name__ == "__main__":
    run()
