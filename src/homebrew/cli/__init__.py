"""Command line: one module for each command.

`main` parses the command line with tyro and handles errors; each command is a dataclass, whose fields are the options
(their docstrings are the `--help` texts) and whose `run` method does the work. To add a command, write such a dataclass
in `<name>_command.py` and add it to `Command` in `main`.

Import torch, and modules that import it, inside functions: `homebrew --help` must not wait for it.
"""
