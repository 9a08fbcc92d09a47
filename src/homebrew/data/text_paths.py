"""Resolve file and folder arguments to lists of files: a file, several, or folders of them."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from homebrew.data.text_file import read_text
from homebrew.errors import DataError
from homebrew.io import absolute_path

Paths = str | Path | Sequence[str | Path]
"""A file, a folder, or a sequence of both."""


def expand_folders(paths: Paths, *suffixes: str) -> list[Path]:
    """Replace each folder by the files in it and in its subfolders, sorted by path. Hidden files are left out.

    Args:
        paths: Files and folders.
        suffixes: Suffixes of the files to take from a folder. Only files with the first suffix that occurs are taken.

    Raises:
        DataError: A folder has no such file.
    """
    files: list[Path] = []
    for path in [paths] if isinstance(paths, str | bytes | Path) or not isinstance(paths, Iterable) else paths:
        folder = absolute_path(path)
        # os.path instead of pathlib, which raises OSError for a name that is too long for the file system.
        is_folder = os.path.isdir(folder) and str(path) != ""  # noqa: PTH112
        files += _files_in(folder, suffixes) if is_folder else [Path(path)]
    return files


def text_files(paths: Paths) -> list[Path]:
    """Return the given text files, with the `.txt` files of each given folder."""
    return expand_folders(paths, ".txt")


def read_texts(paths: Paths) -> str:
    """Read UTF-8 text files as one text. Every file but the last ends with a newline, which is added if missing."""
    *texts, last = [read_text(path) for path in text_files(paths)] or [""]
    return "".join(text if text.endswith("\n") else f"{text}\n" for text in texts if text) + last


def describe_files(paths: Sequence[str | Path], *, kind: str = "file") -> str:
    """Return a description for messages and metadata, such as "the file a.txt and 2 more"."""
    more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
    return f"the {kind} {paths[0]}{more}" if paths else "no file"


def _files_in(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if not any(part.startswith(".") for part in path.relative_to(folder).parts) and path.is_file()
    ]
    for suffix in suffixes:
        if found := [path for path in files if path.suffix.lower() == suffix]:
            return found
    raise DataError(
        f"The folder {str(folder)!r} has no {' or '.join(suffixes)} files. Pass the files, or another folder."
    )
