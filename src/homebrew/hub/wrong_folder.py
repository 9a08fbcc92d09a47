"""Errors for a folder that does not exist, or is not a model: they name the folders that may have been meant."""

import contextlib
import difflib
from collections.abc import Iterator
from pathlib import Path

_MODEL_MARKS = ("checkpoints", "manifest.json", "config.json", "adapter_config.json")
"""What makes a folder a run, a checkpoint, a model in transformers' format or an adapter in PEFT's."""
_MAX_LISTED = 8


def no_folder(name: str) -> str:
    """Return the sentence that there is no such folder, with the folder of the most similar name beside it."""
    path = Path(name)
    close = difflib.get_close_matches(path.name, [folder.name for folder in _subfolders(path.parent)], n=1)
    return f"There is no folder {name}." + (f" Did you mean {path.parent / close[0]}?" if close else "")


def not_a_model(folder: Path) -> str:
    """Return the message for a folder that `load_model` cannot open, with the models in its subfolders."""
    found = [_shown(path) for path in _subfolders(folder) if any((path / mark).exists() for mark in _MODEL_MARKS)]
    if not found:
        return (
            f"{folder.absolute()} has no config.json and no checkpoints. Pass the folder of a run, a checkpoint, an "
            f"adapter or a model in transformers' format."
        )
    more = f" and {len(found) - _MAX_LISTED} more" if len(found) > _MAX_LISTED else ""
    return f"{_shown(folder)} is not a model, but has models in it. Pass one of {', '.join(found[:_MAX_LISTED])}{more}."


def _shown(path: Path) -> str:
    """Return a path as a user in the current folder would write it."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _subfolders(folder: Path) -> Iterator[Path]:
    with contextlib.suppress(OSError):  # the folder does not exist, or may not be read
        yield from sorted(path for path in folder.iterdir() if path.is_dir())
