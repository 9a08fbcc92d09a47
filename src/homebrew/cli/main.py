"""Entry point of the `homebrew` program: parses the command line, runs a command, handles its errors."""

import os
import sys
import typing
import warnings
from collections.abc import Sequence
from typing import Annotated

import tyro

import homebrew
from homebrew.cli.doctor_command import Doctor
from homebrew.cli.eval_command import Eval
from homebrew.cli.export_command import Export
from homebrew.cli.help_texts import set_help_texts
from homebrew.cli.option_names import explain_unknown_name
from homebrew.cli.option_types import OPTION_TYPES
from homebrew.cli.plot_command import Plot
from homebrew.cli.prepare_command import Prepare
from homebrew.cli.sample_command import Sample
from homebrew.cli.saved_command import saved_options
from homebrew.cli.tokenizer_command import Tokenizer
from homebrew.cli.train_command import Train
from homebrew.errors import HomebrewError
from homebrew.io import is_disk_full

Command = (
    Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Tokenizer, tyro.conf.subcommand("tokenizer")]
    | Annotated[Prepare, tyro.conf.subcommand("prepare")]
    | Annotated[Sample, tyro.conf.subcommand("sample")]
    | Annotated[Eval, tyro.conf.subcommand("eval")]
    | Annotated[Plot, tyro.conf.subcommand("plot")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Doctor, tyro.conf.subcommand("doctor")]
)
COMMANDS: dict[str, type] = {
    kind.__name__.lower(): kind for kind in (typing.get_args(command)[0] for command in typing.get_args(Command))
}
"""The dataclass of each command by its name."""

_CONFIG = (tyro.conf.FlagCreatePairsOff,)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Command-line arguments. Default: `sys.argv[1:]`.

    Returns:
        The exit code: 0 on success, 1 after a `HomebrewError` or if standard output cannot be written to. The error,
        and each warning, is printed on one line of standard error.

    Raises:
        SystemExit: With code 2 if the arguments cannot be parsed, with code 0 after `--help`.
        KeyboardInterrupt: The user pressed Ctrl-C.
    """
    try:
        try:
            return _run(sys.argv[1:] if arguments is None else arguments)
        finally:
            sys.stdout.flush()
    except OSError as error:
        is_closed_pipe = isinstance(error, BrokenPipeError)  # the reader of the pipe, such as `head`, has exited
        if error.filename is not None or not (is_closed_pipe or is_disk_full(error)):
            raise  # not an error of standard output
        # Replace standard output, otherwise Python prints an error when it flushes it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not is_closed_pipe:
            print(f"homebrew: The output could not be written: {error.strerror}.", file=sys.stderr)
        return 1


def _run(arguments: Sequence[str]) -> int:
    if list(arguments) == ["--version"]:
        print(f"homebrew {homebrew.__version__}")
        return 0
    if mistake := explain_unknown_name(arguments, COMMANDS):
        print(f"homebrew: {mistake}", file=sys.stderr)
        raise SystemExit(2)
    if not arguments or arguments[0] not in COMMANDS:
        _exit_with_help(arguments)
    name, *words = arguments
    command = COMMANDS[name]
    set_help_texts(command)

    warnings.formatwarning = lambda message, *_, **__: f"{_as_line(message)}\n"
    try:
        default = saved_options(arguments) or tyro.MISSING_NONPROP
        # Parse only this command's options, so that errors refer to the command's help.
        prog = f"homebrew {name}"
        tyro.cli(command, prog=prog, args=words, default=default, config=_CONFIG, registry=OPTION_TYPES).run()
    except HomebrewError as error:
        print(_as_line(error), file=sys.stderr)
        return 1
    return 0


def _as_line(problem: Warning | HomebrewError | str) -> str:
    return f"homebrew: {' '.join(str(problem).split())}"


def _exit_with_help(arguments: Sequence[str]) -> None:
    """Exit with the help of all commands, or with an error for arguments that name no command."""
    tyro.cli(
        Command,
        prog="homebrew",
        description=(
            "Train, sample, evaluate, plot and export GPTs.\n\n"
            "To list a command's options: homebrew COMMAND --help\n\n"
            "To print the version: homebrew --version"
        ),
        args=arguments,
        config=_CONFIG,
        registry=OPTION_TYPES,
    )
