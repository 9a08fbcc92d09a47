"""The settings of a run, as in `run.json`, by names such as "config/learning_rate"."""

from typing import Any

Settings = dict[str, int | float | str | bool]


def flatten_settings(nested: dict[str, Any], prefix: str = "") -> Settings:
    """Flatten nested dictionaries to "a/b" keys with scalar values, as trackers require."""
    flat: Settings = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat |= flatten_settings(value, f"{prefix}{key}/")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, int | float | str | bool) else str(value)
    return flat
