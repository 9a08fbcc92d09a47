"""Files of a folder or of a repository on the Hugging Face hub, found and read with care; folders to write to."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import huggingface_hub
from safetensors import SafetensorError, safe_open

from homebrew.errors import ModelError

MAX_TEXT_BYTES = 16 * 2**20
"""Longer descriptions are not read; the index of GPT-2 XL has 0.05 MB."""


class Source(Protocol):
    """Where files come from."""

    name: str

    def find(self, filename: str) -> Path | None:
        """The file's path on this machine, or None where there is no such file."""

    def filenames(self) -> list[str]:
        """All files there are."""


def open_source(name_or_folder: str | Path, *, revision: str | None = None, local_files_only: bool = False) -> Source:
    """A folder where there is one of that name, else a repository of the hub.

    Args:
        name_or_folder: a folder, or a repository's name, such as "openai-community/gpt2".
        revision: branch, tag or commit of the repository.
        local_files_only: take the repository from the local cache only.

    Raises:
        ModelError: there is no such folder, or it was given a revision. Looking for a file raises it where
            the repository cannot be had.
    """
    name = str(name_or_folder)
    with named(name):
        is_folder, is_file = Path(name).is_dir(), Path(name).is_file()
    if is_folder:
        if revision is not None:
            raise ModelError(f"revision={revision!r} was given, but {name} is a folder, which has none.")
        return _Folder(name)
    if is_file:
        raise ModelError(f"{name} is a file: give the folder it is in, a run's folder, or a repository's name.")
    if isinstance(name_or_folder, Path) or name.startswith((".", "~", "/")) or name.count("/") > 1:
        raise ModelError(f"There is no folder {name}. Give one that exists, or a repository's name.")
    if "/" in name and revision is None and Path(name).parent.is_dir():  # a slip; offline the hub takes half a minute
        raise ModelError(
            f"There is no folder {name}, though {Path(name).parent} is one. Give one that exists; a repository of that "
            f"name can be had where there is no such folder, or by from_pretrained with a revision."
        )
    return _Repository(name, revision, local_files_only=local_files_only)


@contextmanager
def named(name: str | Path) -> Iterator[None]:
    """While a path is looked for that a stranger may have named: its name may be longer than a path's can be.

    Raises:
        ModelError: the system refuses to look.
    """
    try:
        yield
    except OSError as error:
        raise ModelError(f"{str(name)[:100]!r} cannot be looked for: {error.strerror}.") from error


class _Folder:
    def __init__(self, name: str) -> None:
        self.name = name

    def find(self, filename: str) -> Path | None:
        path = Path(self.name, filename)
        # The hub's cache has nothing but links in its snapshots, to the blobs beside them; `blobs` itself is no link.
        with named(path):
            if path.is_symlink() and path.resolve().parent != path.parent.resolve().parent.parent / "blobs":
                raise ModelError(f"{path} is a link, which is not followed: put the file itself there.")
            return path if path.is_file() else None

    def filenames(self) -> list[str]:
        return sorted(path.name for path in Path(self.name).iterdir())


class _Repository:
    """A repository of the hub; all files are of the commit that the first was of."""

    def __init__(self, name: str, revision: str | None, *, local_files_only: bool) -> None:
        self.name = name
        self._revision = revision
        self._local_files_only = local_files_only
        self._snapshot: Path | None = None

    def find(self, filename: str) -> Path | None:
        from huggingface_hub.errors import (
            EntryNotFoundError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        try:
            path = Path(
                huggingface_hub.hf_hub_download(
                    self.name, filename, revision=self._revision, local_files_only=self._local_files_only
                )
            )
        except LocalEntryNotFoundError as error:
            if self._snapshot is not None:
                return None
            where = "local cache" if self._local_files_only else "local cache, and the hub does not answer"
            raise ModelError(
                f"{self.name} is neither a folder nor in the {where}. Check the name and the network."
            ) from error
        except EntryNotFoundError:
            return None
        except RepositoryNotFoundError as error:
            raise ModelError(
                f"{self.name} is neither a folder nor a repository of the hub that you can see. Check the name; for a "
                f"private or gated one, log in with `hf auth login`."
            ) from error
        except RevisionNotFoundError as error:
            raise ModelError(
                f"{self.name} has no revision {self._revision!r}: give a branch, tag or commit."
            ) from error
        except (OSError, ValueError) as error:  # the hub's own errors among them, whatever went wrong there
            reason = str(error).strip().split("\n")[0]
            raise ModelError(f"{self.name} cannot be had: {reason} Check the name and the revision.") from error
        self._snapshot = path.parent
        self._revision = path.parent.name
        _check_blob(path)
        return path

    def filenames(self) -> list[str]:
        if self._local_files_only:
            return sorted(path.name for path in self._snapshot.iterdir()) if self._snapshot else []
        return sorted(huggingface_hub.list_repo_files(self.name, revision=self._revision))


def _check_blob(path: Path) -> None:
    """The cache names a large file by its SHA-256; one damaged on the way or on disk is found out here."""
    blob = path.resolve()
    if not re.fullmatch("[0-9a-f]{64}", blob.name):
        return
    with blob.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != blob.name:
        raise ModelError(f"{path} has SHA-256 {found}, not {blob.name}: delete {blob} and download it again.")


@contextmanager
def writing_to(folder: Path, *, unless: Mapping[str, str]) -> Iterator[None]:
    """While a folder's files are written: it is made, where it is not there.

    Args:
        folder: where to.
        unless: what the folder must not hold, by the name of a file that says so: what is written would not be found
            beside it, or destroy it.

    Raises:
        ModelError: it holds such a file, or cannot be written.
    """
    try:
        for name, kind in unless.items():
            if (folder / name).exists():
                raise ModelError(f"{folder} holds {kind} ({name}): choose another folder.")
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder} cannot be written: {error}. Choose a folder that can.") from error


def read_text(path: Path) -> str:
    """A description's text.

    Raises:
        ModelError: it is too long, not UTF-8, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_TEXT_BYTES + 1)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}.") from error
    if len(data) > MAX_TEXT_BYTES:
        raise ModelError(f"{path} is too long: a description has at most {MAX_TEXT_BYTES} bytes.")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ModelError(f"{path} is not text in UTF-8: {error}.") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        ModelError: it is too long, or holds something else.
    """
    text = read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a {type(value).__name__}, where an object belongs.")
    return value


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """A safetensors file, its tensors not read yet.

    Raises:
        ModelError: it is not one, or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, RuntimeError, TypeError) as error:  # the last two are PyTorch's, at huge shapes
        reason = str(error).partition("\n")[0]
        raise ModelError(f"{path} cannot be read as safetensors: {reason}. Copy or download it again.") from error
