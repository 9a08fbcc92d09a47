"""The command that started a run, kept in `run.json`, so that `homebrew train --resume` needs only the run's folder."""

import argparse
import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path

import tyro

from homebrew.cli.train_command import Train
from homebrew.cli.train_options import DataOptions, ModelOptions
from homebrew.errors import ConfigError, HomebrewError
from homebrew.io import absolute_path, local_path_or_name


def command_line(train: Train) -> str:
    """Return the `homebrew train` command of these options, with absolute paths and without options for resuming."""
    words = ["homebrew", "train", *(str(absolute_path(path)) for path in train.data.files)]
    for options in (train.data, train.model, train.trainer, train.samples):
        for field in dataclasses.fields(options):
            value = getattr(options, field.name)
            if field.name != "files" and value != field.default:
                words += _option_words(field.name, value)
    return shlex.join(words)


def _option_words(name: str, value: object) -> list[str]:
    option = f"--{name.replace('_', '-')}"
    items = value if isinstance(value, tuple) else [value]
    values = [str(absolute_path(item) if isinstance(item, Path) else item) for item in items]
    if name in ("eval_data", "sample_prompt"):  # repeated for each value, with "=" in case it begins with a dash
        return [f"{option}={value}" for value in values]
    if name == "compile":
        return [option, "yes" if value else "no"]
    return [option] if value is True else [option, *values]


def saved_options(arguments: Sequence[str]) -> Train | None:
    """Load the options of the run that a command line resumes. They become the defaults of the command line.

    Args:
        arguments: The command line's words after `homebrew`.

    Returns:
        None if the command line does not resume a run, or resumes one that another program started.

    Raises:
        ConfigError: Options are neither in `run.json` nor on the command line, or the command line has another
            --init-from or --init than `run.json`.
    """
    if list(arguments[:1]) != ["train"]:
        return None
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--output-dir", "--output_dir", nargs="?", type=Path)
    for name in ("max-steps", "eval-data", "sample-prompt", "init-from", "init"):
        parser.add_argument(f"--{name}", f"--{name.replace('-', '_')}", nargs="?")
    given, _ = parser.parse_known_args(arguments[1:])
    if not given.resume or set(arguments) & {"-h", "--help"}:
        return None
    if given.output_dir is None:
        raise ConfigError("--resume needs the folder of the run. Add --output-dir.")
    command = _read_command(given.output_dir)
    if command is None:
        if given.max_steps is not None and _has_data(arguments[1:]):
            return None
        if (absolute_path(given.output_dir) / "run.json").exists():
            raise ConfigError(
                f"The run in {given.output_dir} was started from Python, so its model and data are not known here. "
                f"Resume it in its script, with the argument 'resume=True' of `trainer.train`, or give all options."
            )
        raise ConfigError(
            f"{given.output_dir} has no run.json with the options of a run. Check --output-dir, or give all options."
        )
    train = _parse_saved(command, given.output_dir)
    _check_initial_weights(given, train.model)
    if given.eval_data is not None:
        train.data.eval_data = ()  # otherwise the given files would be added
        train.data.eval_fraction = DataOptions.eval_fraction  # the saved fraction has no effect with --eval-data
    if given.sample_prompt is not None:
        train.samples.sample_prompt = ()
    return train


def _has_data(words: Sequence[str]) -> bool:
    """Return whether a command line names data, or has a mistake, which is reported when it is parsed later."""
    try:
        return bool(_parse(words).data.files)
    except SystemExit:
        return True


def _check_initial_weights(given: argparse.Namespace, saved: ModelOptions) -> None:
    """Raise an error for other initial weights, which would have no effect on a run that has started."""
    is_adapter = saved.lora_rank is not None  # its base may have moved
    if given.init_from is not None and not is_adapter and str(local_path_or_name(given.init_from)) != saved.init_from:
        option, value = "--init-from", given.init_from
    elif given.init is not None and given.init != saved.init:
        option, value = "--init", given.init
    else:
        return
    raise ConfigError(
        f"{option} {value}: the run has started from {saved.init_from or f'new weights (--init {saved.init})'}. "
        f"Remove {option}, or start another run."
    )


def _read_command(output_dir: Path) -> str | None:
    from homebrew.hub.model_folder import find_file, read_json

    path = find_file(absolute_path(output_dir), "run.json")
    command = None if path is None else read_json(path).get("command")
    return command if isinstance(command, str) else None


def _parse(words: Sequence[str]) -> Train:
    return tyro.cli(Train, args=words, config=(tyro.conf.FlagCreatePairsOff,), console_outputs=False)


def _parse_saved(command: str, output_dir: Path) -> Train:
    """Parse a saved command. `output_dir` replaces the saved folder, because the run may have been moved."""
    try:
        train = _parse(shlex.split(command)[2:])
    except (ValueError, SystemExit, HomebrewError) as error:
        raise ConfigError(
            f"The command in {output_dir / 'run.json'} is not valid: {command!r:.200}. Remove the file, and give all "
            f"options of the run."
        ) from error
    return dataclasses.replace(train, trainer=dataclasses.replace(train.trainer, output_dir=output_dir))
