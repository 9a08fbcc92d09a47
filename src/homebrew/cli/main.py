"""`homebrew`: the command that is asked for, and what becomes of its errors."""

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from homebrew.cli.doctor_command import Doctor
from homebrew.cli.eval_command import Eval
from homebrew.cli.export_command import Export
from homebrew.cli.prepare_command import Prepare
from homebrew.cli.sample_command import Sample
from homebrew.cli.train_command import Train
from homebrew.errors import HomebrewError

Command = (
    Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Prepare, tyro.conf.subcommand("prepare")]
    | Annotated[Sample, tyro.conf.subcommand("sample")]
    | Annotated[Eval, tyro.conf.subcommand("eval")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Doctor, tyro.conf.subcommand("doctor")]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: the command line's if not given.

    Returns:
        The exit code: 0; 1 after an error of ours, which is one line on standard error.

    Raises:
        SystemExit: with 2, where the arguments are wrong; with 0 after --help.
        KeyboardInterrupt: at Ctrl-C.
    """
    try:
        command = tyro.cli(
            Command,
            prog="homebrew",
            description="Train GPTs, let them write, measure them, and hand them on.",
            args=arguments,
            config=(tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone),
        )
        command.run()
        sys.stdout.flush()
    except HomebrewError as error:
        print(f"homebrew: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of a pipe, `head` for one, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes
        return 1
    return 0
