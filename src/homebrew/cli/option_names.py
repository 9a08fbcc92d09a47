"""Names of a command's options, and suggestions for unknown names."""

import dataclasses
import difflib
import re
import typing
from collections.abc import Iterator, Mapping, Sequence

from tyro.conf import Positional, Suppress

from homebrew.training.argument_names import OTHER_NAMES
from homebrew.training.unknown_arguments import similar_names

_OTHER_NAMES = {name.replace("_", "-"): others.replace("_", "-") for name, others in OTHER_NAMES.items()} | {
    "block-size": "context context-length context-size ctx seq-len sequence-length max-length",
    "eval-data": "val-data validation-data val",
    "eval-fraction": "val-fraction val-split test-size split",
    "init-from": "from pretrained checkpoint base base-model model-name-or-path",
    "lora-rank": "lora lora-r r rank",
    "max-new-tokens": "max-tokens num-tokens tokens length max-length n",
    "n-embd": "n-embed d-model dim hidden-size embedding-size width",
    "n-head": "heads n-heads num-heads",
    "n-layer": "depth layers n-layers num-layers",
    "output": "out output-file output-dir",
    "preset": "config model model-size model-type size",
    "prompt": "input start",
    "resume": "resume-from-checkpoint",
    "overwrite": "overwrite-output-dir",
    "sample-every": "sample-interval sample-steps generate-every",
    "sample-max-new-tokens": "sample-tokens",
    "sample-prompt": "sample-prompts prompt prompts",
    "temperature": "temp t",
    "shard-tokens": "shard-size",
    "text": "data file input",
    "text-field": "text-column column field",
    "tokenizer": "encoding vocab",
    "val-fraction": "eval-fraction val-split test-size split",
    "workers": "num-proc num-workers jobs",
    "x": "x-axis xaxis axis",
}
"""Names of options in other programs."""

_NOT_OPTIONS = {*Positional[int].__metadata__, *Suppress[int].__metadata__}  # type: ignore[attr-defined]


def option_names(command: type) -> list[str]:
    """Return the names of a command's options, such as "--max-steps"."""
    return [f"--{name.replace('_', '-')}" for name in _field_names(command)]


def _field_names(command: type) -> Iterator[str]:
    for name, annotation in typing.get_type_hints(command, include_extras=True).items():
        kind = typing.get_args(annotation)[0] if hasattr(annotation, "__metadata__") else annotation
        if dataclasses.is_dataclass(kind):
            yield from _field_names(typing.cast("type", kind))
        elif _NOT_OPTIONS.isdisjoint(getattr(annotation, "__metadata__", ())):
            yield name


def explain_unknown_name(arguments: Sequence[str], commands: Mapping[str, type]) -> str | None:
    """Return a message about the first command or option that does not exist, or None if all exist.

    Args:
        arguments: The words after `homebrew`.
        commands: The dataclass of each command.
    """
    if not arguments or arguments[0].startswith("-") or {"-h", "--help"} & set(arguments):
        return None
    name, *words = arguments
    if name not in commands:
        close = difflib.get_close_matches(name, commands, n=1)
        return f"There is no command {name}. " + (
            f"Did you mean {close[0]}?" if close else f"The commands are {', '.join(commands)}."
        )
    options = option_names(commands[name])
    for word in words:
        option = word.partition("=")[0].replace("_", "-")
        if re.match(r"--[A-Za-z]", option) and option not in options:
            similar = similar_names(option.lower()[2:], [known[2:] for known in options], _OTHER_NAMES)
            hint = f"Did you mean {' or '.join(f'--{known}' for known in similar)}? " if similar else ""
            return f"`homebrew {name}` has no option {option}. {hint}To list all options: homebrew {name} --help"
    return None
