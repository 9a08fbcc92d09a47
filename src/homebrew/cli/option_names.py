"""The options of a command: suggestions for names that do not exist, and errors of the library in terms of options."""

import dataclasses
import difflib
import re
import typing
from collections.abc import Iterator, Mapping, Sequence

from tyro.conf import Positional, Suppress

_OTHER_NAMES = {
    "--block-size": "context context-length context-size ctx seq-len sequence-length max-length",
    "--eval-batches": "eval-iters",
    "--eval-data": "val-data validation-data val",
    "--eval-every": "eval-interval eval-steps",
    "--eval-fraction": "val-fraction val-split test-size split",
    "--init-from": "from pretrained checkpoint base base-model model-name-or-path",
    "--learning-rate": "lr rate",
    "--log-every": "log-interval logging-steps",
    "--log-with": "report-to tracker wandb tensorboard",
    "--lora-rank": "lora lora-r r rank",
    "--max-grad-norm": "grad-clip clip clip-norm",
    "--max-new-tokens": "max-tokens num-tokens tokens length max-length n",
    "--max-steps": "steps num-steps iters iterations max-iters epochs num-epochs num-train-epochs",
    "--micro-batch-size": "batch bs batch-size per-device-train-batch-size",
    "--global-batch-tokens": "batch batch-tokens gradient-accumulation-steps",
    "--mixed-precision": "precision dtype bf16 fp16 amp",
    "--n-embd": "n-embed d-model dim hidden-size embedding-size width",
    "--n-head": "heads n-heads num-heads",
    "--n-layer": "depth layers n-layers num-layers",
    "--output": "out output-file output-dir",
    "--output-dir": "out out-dir output save-dir",
    "--preset": "config model model-size model-type size",
    "--prompt": "input start",
    "--save-every": "save-interval save-steps checkpoint-every",
    "--temperature": "temp t",
    "--text": "data file input",
    "--tokenizer": "encoding vocab",
    "--warmup-steps": "warmup warmup-iters",
    "--weight-decay": "decay wd",
}
"""Names of options in other programs, such as nanoGPT and the scripts of transformers."""

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
    """Return a message about the first command or option that does not exist, or None if there is none.

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
            similar = _similar(option, options)
            hint = f"Did you mean {' or '.join(similar)}? " if similar else ""
            return f"`homebrew {name}` has no option {option}. {hint}To list all options: homebrew {name} --help"
    return None


def _similar(name: str, options: Sequence[str]) -> list[str]:
    meant = [option for option in options if name.lower()[2:] in _OTHER_NAMES.get(option, "").split()]
    return meant or difflib.get_close_matches(name.lower(), options, n=2)


def in_terms_of_options(message: str, command: type) -> str:
    """Replace argument names in an error message by option names: "max_steps=0" becomes "--max-steps 0"."""
    call = r"train\((resume|overwrite)=True(?:, accept_changes=[(\[]([^)\]]*)[)\]])?\)"
    message = re.sub(call, _options_of_call, message)
    for option in option_names(command):
        name = rf"(?<![\w/.'\"-]){option[2:].replace('-', '_')}"  # not within a path or a quotation
        message = re.sub(rf"{name}=True\b", option, message)
        message = re.sub(rf"{name}=(?=[\w'\"(\[-])", f"{option} ", message)
        message = re.sub(rf"{name}=", option, message)
        if "-" in option[2:]:  # a name of one word may be the plain word
            message = re.sub(rf"{name}(?![\w/'\"]|\.\w)", option, message)
    return message


def _options_of_call(call: re.Match[str]) -> str:
    aspects = re.findall(r"\w+", call[2] or "")
    return " ".join([f"--{call[1]}", *(f"--accept-changes {aspect}" for aspect in aspects)])
