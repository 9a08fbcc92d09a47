"""File operations: paths, opening of regular files only, durable writes and removals, and strict JSON."""

import contextlib
import errno
import json
import math
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from homebrew.errors import ConfigError, HomebrewError

_CHUNK_BYTES = 1 << 24


def absolute_path(path: str | Path) -> Path:
    """Return an absolute path, which does not depend on later changes of the working directory, and expand `~`.

    Links are kept. Public functions call this, or `local_path_or_name`, once for each path that they are given.

    Raises:
        ConfigError: The path is an empty string, which `Path` would turn into the current folder; is neither a
            string nor a `Path`; or has characters that no path can have.
    """
    if path == "":
        raise ConfigError("A path is an empty string. Give a path; the current folder is '.'.")
    try:
        is_valid = isinstance(path, str | Path) and b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        is_valid = False
    if not is_valid:
        raise ConfigError(f"{path!r:.200} is not a valid path. Use a string without NUL and surrogates, or a Path.")
    return Path(os.path.expanduser(path)).absolute()  # noqa: PTH111 - unlike Path.expanduser, no error for ~nobody


def local_path_or_name(source: str | Path) -> str | Path:
    """Return the absolute path of a file or folder; keep a string that is not an existing path, such as a Hub name."""
    path = absolute_path(source)
    # os.path instead of pathlib, which raises OSError for a name that is too long for the file system.
    return path if isinstance(source, Path) or os.path.exists(path) else source  # noqa: PTH110


def open_regular(path: str | Path, flags: int = os.O_RDONLY) -> int:
    """Open a regular file and return its descriptor. Opening a pipe or a device fails instead of blocking.

    A link as the last part of the path is not followed; links in the directory part are.

    Args:
        path: Path of the file.
        flags: Flags of `os.open`, such as `os.O_RDWR | os.O_APPEND | os.O_CREAT`.

    Raises:
        OSError: The file cannot be opened, or is a symbolic link, a directory, a pipe or a device. `strerror` says
            which, and `filename` is set.
    """
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP and Path(path).is_symlink():
            error.strerror = "Is a symbolic link"  # the system's text would be "Too many levels of symbolic links"
        raise
    except ValueError as error:  # a null byte in the name
        raise OSError(errno.EINVAL, str(error), str(path)) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    return descriptor


@contextlib.contextmanager
def atomic_replace(path: Path) -> Iterator[Path]:
    """Yield a temporary file that replaces `path` when the block ends without an error.

    The new file is synced to disk before it replaces the old one, and its mode follows the umask. On an OSError,
    `path` is unchanged.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with _named_in_errors(path):
            temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors creates its files with mode 0600
        with _named_in_errors(path):
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        fsync_directory(path.parent)
    finally:
        with contextlib.suppress(OSError):  # it has been renamed, or the first error is the one to raise
            temporary.unlink()


def remove_leftovers(path: Path) -> None:
    """Remove the temporary files of killed `atomic_replace(path)` blocks. No such block may be running."""
    name = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}")
    with contextlib.suppress(OSError):  # files that cannot be removed do no harm
        for file in path.parent.iterdir():
            if name.fullmatch(file.name) and not file.is_dir():
                file.unlink()


def write_durably(path: Path, *buffers: bytes | memoryview) -> None:
    """Write a new file and sync it to disk; its mode follows the umask.

    Raises:
        FileExistsError: The file exists.
        OSError: The file could not be written completely, for example on a full disk. Its `filename` is `path`.
    """
    with _named_in_errors(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            for buffer in buffers:
                view, written = memoryview(buffer), 0
                while written < len(view):
                    written += os.write(descriptor, view[written : written + _CHUNK_BYTES])
            os.fsync(descriptor)
        finally:
            _close(descriptor)


def is_disk_full(error: OSError) -> bool:
    """Return whether a write failed because of a full disk, a quota, or a limit on the size of files."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def fsync_directory(path: Path) -> None:
    """Sync a directory's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with _named_in_errors(path):
            os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot sync directories
            raise
    finally:
        _close(descriptor)


def make_directory(path: Path) -> None:
    """Create a directory and its missing parents, and sync the new entries to disk."""
    if not path.is_dir():
        make_directory(path.parent)
        path.mkdir(exist_ok=True)
        fsync_directory(path.parent)


def remove_tree(path: Path) -> None:
    """Remove a directory tree, a file, or a symbolic link (not its target); a missing path is not an error."""
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISDIR(path.lstat().st_mode):
            shutil.rmtree(path)
        else:
            path.unlink()


def _close(descriptor: int) -> None:
    """Close a file, ignoring errors: it has been synced, or its write has failed with an error that is raised."""
    with contextlib.suppress(OSError):
        os.close(descriptor)


@contextlib.contextmanager
def write_errors(path: Path, kind: type[HomebrewError], remedy: str) -> Iterator[None]:
    """Convert an OSError to an error of another class. The message names the OSError's file, if known, or `path`.

    Args:
        path: Path that the block writes to.
        kind: Class of the error.
        remedy: Sentence that says what to do.
    """
    try:
        yield
    except OSError as error:
        raise kind(f"{error.filename or path} cannot be written: {error.strerror}. {remedy}") from error


@contextlib.contextmanager
def _named_in_errors(path: Path) -> Iterator[None]:
    """Set the `filename` of an OSError: it is missing after calls on a descriptor, or names a temporary file."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def strict_json(value: object, **options: Any) -> str:  # noqa: ANN401 - those of json.dumps
    """Serialize to JSON that every parser reads.

    JSON has no NaN and no infinity, although Python would write them. Here they become null, as in JavaScript.
    """
    return json.dumps(_without_non_finite(value), allow_nan=False, **options)  # noqa: TID251


def _without_non_finite(value: object) -> object:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {_without_non_finite(key): _without_non_finite(item) for key, item in value.items()}
        case list() | tuple():
            return [_without_non_finite(item) for item in value]
    return value
