"""Model folders: local folders, snapshots of Hugging Face Hub repositories, and bounded reads of their files."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from homebrew import bounded_readers
from homebrew.bounded_readers import Shapes, read_bytes
from homebrew.errors import ModelError
from homebrew.io import local_path_or_name


def local_folder(
    name_or_folder: str | Path,
    filenames: Sequence[str],
    *,
    revision: str | None = None,
    local_files_only: bool = False,
) -> Path:
    """Return a local folder, or download a Hub repository and return the folder of its snapshot.

    `filenames` are names or glob patterns. Files that the repository does not have are ignored.
    """
    name = str(local_path_or_name(name_or_folder))
    # os.path instead of pathlib, which raises OSError for a name that is too long for the file system.
    if os.path.isdir(name):  # noqa: PTH112
        if revision is not None:
            raise ModelError(f"revision={revision!r} needs a Hub repository, but {name} is a local folder.")
        return Path(name)
    if os.path.isfile(name):  # noqa: PTH113
        raise ModelError(f"{name} is a file. Pass the folder that contains it.")
    if isinstance(name_or_folder, Path) or name.startswith((".", "~", "/")) or name.count("/") > 1:
        raise ModelError(f"There is no folder {name}. Pass an existing folder or a Hub repository id.")
    parent = os.path.dirname(name)  # noqa: PTH120
    if revision is None and parent and os.path.isdir(parent):  # noqa: PTH112
        # Most likely a typo in a local path: without a network, asking the Hub would take half a minute.
        raise ModelError(
            f"There is no folder {name}. It was not looked up on the Hub, because there is a folder {parent}. To "
            f"download a repository of this name, start in another folder."
        )
    return _download_snapshot(name, filenames, revision, local_files_only=local_files_only)


def _download_snapshot(
    repository: str, filenames: Sequence[str], revision: str | None, *, local_files_only: bool
) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        snapshot = snapshot_download(
            repository, revision=revision, allow_patterns=list(filenames), local_files_only=local_files_only
        )
    except LocalEntryNotFoundError as error:
        reason = "local_files_only is set" if local_files_only else "the Hub could not be reached"
        raise ModelError(
            f"There is no folder {repository}. As a Hub repository, it is not complete in the cache, and {reason}. "
            f"Check the name and the network connection."
        ) from error
    except Exception as error:  # from the Hub client or the HTTP library that it uses
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"There is no folder {repository}. As a Hub repository, it could not be downloaded "
            f"({type(error).__name__}: {reason}). Check the name, the revision, the network connection and the disk; "
            f"for a private or gated repository, log in with `hf auth login`."
        ) from error
    return Path(snapshot)


def find_file(folder: Path, name: str) -> Path | None:
    """Return the path of a regular file in a model folder, or None if the folder has no such file.

    In a snapshot of the Hub cache, the path is a link to a blob of the cache. Readers open the file it resolves to.

    Raises:
        ModelError: The file is a symbolic link that is not one of the Hub cache's.
    """
    path = folder / name
    if path.is_symlink() and _target(path).parent != _target(folder).parent.parent / "blobs":
        raise ModelError(f"{path} is a symbolic link, which could lead to any file. Replace it with the file itself.")
    return path if path.is_file() else None


@contextmanager
def output_folder(folder: Path, *, forbidden_files: Mapping[str, str] | None = None) -> Iterator[None]:
    """Create a folder, and convert errors in writing its files to ModelError.

    `forbidden_files` maps names of files that the folder must not contain, besides those of runs and checkpoints, to a
    description of a folder with such a file. The new files would overwrite its content, or readers would find that
    content instead of the new files.
    """
    forbidden = {"run.json": "a run", "manifest.json": "a checkpoint", **(forbidden_files or {})}
    try:
        for name, description in forbidden.items():
            if (folder / name).exists():
                raise ModelError(f"{folder} contains {description} ({name}). Choose another folder.")
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except (OSError, SafetensorError) as error:
        raise ModelError(f"Cannot write to {folder}: {error}. Choose a writable folder with enough space.") from error


def read_bounded_text(path: Path) -> str:
    """Read a UTF-8 text file that `find_file` has found."""
    try:
        return read_bytes(_target(path), ModelError).decode()
    except UnicodeDecodeError as error:
        raise ModelError(f"{path} is not UTF-8 text: {error}.") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file that `find_file` has found."""
    return bounded_readers.read_json(_target(path), ModelError)


def open_tensors(path: Path) -> AbstractContextManager[tuple[Any, Shapes]]:
    """Open a safetensors file that `find_file` has found, as `bounded_readers.open_tensors` does."""
    return bounded_readers.open_tensors(_target(path), ModelError)


def _target(path: Path) -> Path:
    """Return the absolute path without links. Unlike `Path.resolve`, this never raises."""
    return Path(os.path.realpath(path))
