"""Error messages for a folder that does not exist, or is not a model. They name folders that may have been meant."""

import contextlib
import difflib
import os
from collections.abc import Iterator
from pathlib import Path

_OPENED_BY_LOAD_MODEL = {"checkpoints": "a run", "manifest.json": "a checkpoint", "adapter_config.json": "an adapter"}
"""Files by which to recognize what `load_model` opens, but `GPT.from_pretrained` does not."""
_MODEL_MARKS = ("config.json", *_OPENED_BY_LOAD_MODEL)
"""Files by which to recognize a model of any kind."""
_MAX_LISTED = 8


def no_folder(name: str) -> str:
    """Return the message that a folder does not exist. It suggests the sibling folder with the most similar name."""
    path = Path(name)
    close = difflib.get_close_matches(path.name, [folder.name for folder in _subfolders(path.parent)], n=1)
    return f"There is no folder {name}." + (f" Did you mean {path.parent / close[0]}?" if close else "")


def not_a_model(folder: Path) -> str:
    """Return the message for a folder without a `config.json`. It lists the models in it, two levels deep."""
    for mark, description in _OPENED_BY_LOAD_MODEL.items():
        if os.path.exists(folder / mark):  # noqa: PTH110 - never raises
            shown = _shown(folder)
            return f"{shown} is {description}. Open it with load_model({shown!r}), which also returns its tokenizer."
    found = [
        _shown(path)
        for subfolder in _subfolders(folder)
        for path in ([subfolder] if _is_model(subfolder) else filter(_is_model, _subfolders(subfolder)))
    ]
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


def _is_model(folder: Path) -> bool:
    return any(os.path.exists(folder / mark) for mark in _MODEL_MARKS)  # noqa: PTH110 - never raises


def _subfolders(folder: Path) -> Iterator[Path]:
    with contextlib.suppress(OSError, ValueError):  # the folder does not exist, may not be read, or has no valid name
        yield from sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
