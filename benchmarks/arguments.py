"""Parsers for command-line options that several scripts share: settings and models."""

import ast
import re
from typing import Any

from homebrew import GPTConfig
from homebrew.errors import ConfigError


def parse_settings(text: str) -> dict[str, Any]:
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


def model_config(text: str, **changes: Any) -> GPTConfig:
    """Return the configuration of a model: a preset with changes, such as "gpt2:n_layer=6,n_head=6,n_embd=384"."""
    preset, _, text = text.partition(":")
    return GPTConfig.preset(preset, **(parse_settings(text) | changes))
