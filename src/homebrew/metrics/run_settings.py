"""The settings of a run, as in `run.json`, by names such as "config/learning_rate"."""

from typing import Any

Settings = dict[str, int | float | str | bool]


def flatten_settings(nested: dict[str, Any], prefix: str = "") -> Settings:
    """Flatten nested dictionaries, and lists of them, to "a/b" keys with scalar values, as trackers require.

    Settings that are None are left out, so that a numeric setting has only numbers in a tracker.
    """
    flat: Settings = {}
    for key, value in nested.items():
        if isinstance(value, list) and all(isinstance(item, dict) for item in value):
            value = {str(index): item for index, item in enumerate(value)}
        if isinstance(value, dict):
            flat |= flatten_settings(value, f"{prefix}{key}/")
        elif value is not None:
            flat[f"{prefix}{key}"] = value if isinstance(value, int | float | str | bool) else str(value)
    return flat
