"""Entry point of `homebrew`, `python -m homebrew` and `accelerate launch -m homebrew`."""

import contextlib
import io
import sys
import warnings

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT, as in shells."""


def run() -> None:
    """Run the command line and exit. Ctrl-C prints no traceback, not even during imports."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a model may generate characters that the terminal cannot encode
    warnings.formatwarning = lambda message, *_, **__: f"homebrew: {message}\n"  # as errors, without the code's line
    try:
        from homebrew.cli.main import main

        code = main()
    except KeyboardInterrupt:
        code = INTERRUPTED
    if code == INTERRUPTED and sys.stderr.isatty():
        with contextlib.suppress(OSError):
            print(file=sys.stderr)  # the terminal has echoed ^C: start the shell's prompt on a new line
    sys.exit(code)


if __name__ == "__main__":
    run()
