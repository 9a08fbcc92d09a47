"""Settings and models on the command line of several scripts."""

import ast
import re
from collections.abc import Collection
from dataclasses import fields
from typing import Any

from homebrew import GPTConfig, TrainerConfig
from homebrew.errors import ConfigError


def parse(text: str) -> dict[str, Any]:
    """Parse "key=value,key=value". A value that is not a Python literal is a string."""
    text = text.replace(" ", "")
    items = re.findall(r"(\w+)=(\([^()]*\)|[^,()#]+)", text)
    if ",".join(map("=".join, items)) != text or len(dict(items)) < len(items):
        raise ConfigError(f"{text!r} cannot be parsed. Write key=value,key=value, each key once.")
    return {key: _literal(value) for key, value in items}


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def parse_settings(text: str, *, also: Collection[str] = (), without: Collection[str] = ()) -> dict[str, Any]:
    """Parse fields of `TrainerConfig` and the keys `also`, but not the fields `without`, which a script sets itself."""
    return _parse_known(text, {field.name for field in fields(TrainerConfig)}.difference(without).union(also))


def _parse_known(text: str, allowed: Collection[str]) -> dict[str, Any]:
    settings = parse(text)
    if unknown := settings.keys() - set(allowed):
        raise ConfigError(
            f"Unknown settings in {text!r}: {', '.join(sorted(unknown))}. Use: {', '.join(sorted(allowed))}."
        )
    return settings


def model_config(text: str, **changes: Any) -> GPTConfig:
    """Return the configuration of a model: a preset with changes, such as "gpt2:n_layer=6,n_head=6,n_embd=384"."""
    preset, _, text = text.partition(":")
    own_changes = _parse_known(text, [field.name for field in fields(GPTConfig)])
    return GPTConfig.preset(preset, **(own_changes | changes))
