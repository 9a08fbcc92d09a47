"""Resolve arguments to lists of files. An argument is a file, a folder, a pattern such as `*.txt`, or several."""

import glob
import itertools
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from homebrew.constants import RUN_FILES, TOKENIZER_FILE
from homebrew.data.text_file import JSON_SUFFIXES, check_regular_file, read_error, read_text
from homebrew.data.token_metadata import TokenMetadata
from homebrew.errors import DataError
from homebrew.io import absolute_path

Paths = str | Path | Sequence[str | Path]
"""A file, a folder, a pattern such as "texts/*.txt", or a sequence of them."""

TEXT_SUFFIXES = (".txt", ".md")
"""Suffixes of the text files that are taken from a folder."""

PREPARE_SUFFIXES = (*JSON_SUFFIXES, ".parquet", ".gz", ".zst")
"""Suffixes of the other files that `homebrew prepare` takes from a folder."""

_SPLIT = re.compile(r"(.*)-(train|val)(-\d{5})?")
"""Stem of a token file of a split that `homebrew prepare --val-fraction` has written."""


def expand_paths(paths: Paths, *suffixes: str | tuple[str, ...]) -> list[Path]:
    """Replace each folder by the files in it and in its subfolders, and each pattern by its matches, sorted by path.

    Hidden files and folders, links to folders, the files of a run in its folder, `tokenizer.json`, and the `.json`
    files that `homebrew prepare` writes are left out.

    Args:
        paths: Files, folders and patterns, such as "shards/train_*.bin".
        suffixes: Suffixes of the files to take from a folder. Only files with the first suffix that occurs are taken.
            The suffixes in a tuple count as one.

    Raises:
        DataError: A folder has no such file or cannot be read; text files are taken from a folder that also has data
            in other formats; or a pattern matches nothing.
    """
    files: list[Path] = []
    for path in [paths] if isinstance(paths, str | bytes | Path) or not isinstance(paths, Iterable) else paths:
        for match in _matches(path):
            folder = absolute_path(match)
            # os.path instead of pathlib, which raises OSError for a name that is too long for the file system.
            is_folder = os.path.isdir(folder) and str(match) != ""  # noqa: PTH112
            files += _files_in(folder, suffixes) if is_folder else [Path(match)]
    return files


def text_files(paths: Paths) -> list[Path]:
    """Return the given text files, with the text files of each given folder and the files of each pattern."""
    return expand_paths(paths, TEXT_SUFFIXES)


def read_texts(paths: Paths) -> str:
    """Read UTF-8 text files as one text. Every file but the last ends with a newline, which is added if missing."""
    *texts, last = [read_text(path) for path in text_files(paths)] or [""]
    return "".join(text if text.endswith("\n") else f"{text}\n" for text in texts if text) + last


def describe_files(paths: Sequence[str | Path], *, kind: str = "file") -> str:
    """Return a description for messages and metadata, such as "the file a.txt and 2 more"."""
    more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
    return f"the {kind} {paths[0]}{more}" if paths else "no file"


def _matches(path: str | Path) -> Sequence[str | Path]:
    """Return the matches of a pattern. Any other path is returned as it is, even if its name has brackets."""
    if os.path.lexists(absolute_path(path)) or not glob.has_magic(str(path)):
        return [path]
    # Not the absolute path, since the name of the current folder may have brackets.
    matches = sorted(glob.glob(os.path.expanduser(path), recursive=True))  # noqa: PTH111, PTH207
    if not matches:
        raise DataError(f"No file matches {str(path)!r}. Check the pattern, and the folder that it starts from.")
    return matches


def _files_in(folder: Path, suffixes: Sequence[str | tuple[str, ...]]) -> list[Path]:
    files: list[Path] = []
    for parent, folders, names in os.walk(folder, onerror=_raise_read_error):
        skipped = RUN_FILES if "run.json" in names else ()
        folders[:] = [name for name in folders if not name.startswith(".") and name not in skipped]
        files += [Path(parent, name) for name in names if not name.startswith(".") and name not in skipped]
    files.sort()
    groups = [(suffix,) if isinstance(suffix, str) else suffix for suffix in suffixes]
    for group in groups:
        if found := _with_suffix(files, group):
            for path in found:
                check_regular_file(path)  # raises for a broken link
            if group == (".npy",):
                _check_splits(folder, found)
            if group == TEXT_SUFFIXES and (others := _with_suffix(files, (*PREPARE_SUFFIXES, ".bin"))):
                pattern = Path(glob.escape(str(folder)), "**", f"*{found[0].suffix}")
                raise DataError(
                    f"The folder {str(folder)!r} has not only text files, but also {str(others[0])!r}. Pass the files "
                    f"or a pattern such as {str(pattern)!r}. `homebrew prepare` tokenizes JSON Lines, Parquet and "
                    f"compressed files, too."
                )
            return found
    remedy = f"Pass the files, a pattern such as {str(folder / 'train_*.bin')!r}, or another folder."
    if others := _with_suffix(files, (*TEXT_SUFFIXES, *PREPARE_SUFFIXES)):
        remedy = f"Tokenize its texts, such as {str(others[0])!r}, with `homebrew prepare`, and use the result."
    raise DataError(f"The folder {str(folder)!r} has no {' or '.join(itertools.chain(*groups))} files. {remedy}")


def _check_splits(folder: Path, files: Sequence[Path]) -> None:
    """Raise DataError if the token files of a folder belong to both splits of `homebrew prepare --val-fraction`."""
    names = [_SPLIT.fullmatch(path.stem) for path in files]
    if {match[2] for match in names if match} == {"train", "val"}:
        prefix = next(match[1] for match in names if match)
        train, val = (str(Path(glob.escape(str(folder)), f"{prefix}-{split}*.npy")) for split in ("train", "val"))
        raise DataError(
            f"The folder {str(folder)!r} has tokens to train on and to validate on. Pass them as {train!r} and, to "
            f"evaluate, {val!r}."
        )


def _with_suffix(files: Sequence[Path], suffixes: tuple[str, ...]) -> list[Path]:
    return [path for path in files if path.suffix.lower() in suffixes and not _is_metadata(path)]


def _raise_read_error(error: OSError) -> None:
    raise read_error(error.filename, error) from error


def _is_metadata(path: Path) -> bool:
    """Return whether a file is a tokenizer, or the metadata of a token file or of the parts in a `.partial` folder."""
    if path.name == TOKENIZER_FILE:
        return True
    if path.suffix != ".json":
        return False
    if not path.with_suffix(".npy").exists():
        return path.parent.suffix == ".partial" and (path.parent / "plan.json").exists()
    try:
        TokenMetadata.read(path)
    except DataError:
        return False
    return True
