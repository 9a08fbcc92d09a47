"""Read files from caches, installed packages and the network, verified by their SHA-256."""

import contextlib
import hashlib
import http.client
import importlib.metadata
import os
import urllib.request
from pathlib import Path

from homebrew.bounded_readers import open_file
from homebrew.errors import DataError
from homebrew.io import absolute_path, atomic_replace

TIMEOUT_SECONDS = 5.0
"""Maximum time without a response from the network."""

MAX_DOWNLOAD_BYTES = 16 * 1024**2


def cache_dir() -> Path:
    """Return the download cache: `$HOMEBREW_GPT_CACHE`, or `homebrew-gpt` in the user's cache directory."""
    if configured := os.environ.get("HOMEBREW_GPT_CACHE"):
        return absolute_path(configured)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "homebrew-gpt"


def read_file(path: Path) -> bytes | None:
    """Read a regular file, following links, or return None if that fails."""
    try:
        with open_file(Path(os.path.realpath(path)), DataError) as (file, size):
            return file.read(size)
    except DataError:
        return None


def read_if_verified(path: Path, sha256: str) -> bytes | None:
    """Read a file, or return None if that fails or its SHA-256 differs."""
    data = read_file(path)
    return data if data is not None and _matches(data, sha256) else None


def installed_files(distribution: str, suffix: str) -> list[Path]:
    """List the files of an installed distribution without importing it.

    Returns:
        Sorted paths. Empty if the distribution is not installed.
    """
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return sorted(Path(str(file.locate())) for file in files if str(file).endswith(suffix))


def download(url: str, sha256: str, cache_path: Path) -> bytes | None:
    """Download a file and store it at `cache_path`. A cache that cannot be written to is not an error.

    Returns:
        The file's content, or None if the download failed or the SHA-256 differs.
    """
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response:  # noqa: S310 - only constant URLs
            data: bytes = response.read(MAX_DOWNLOAD_BYTES)
    except (OSError, http.client.HTTPException):
        return None
    if not _matches(data, sha256):
        return None
    with contextlib.suppress(OSError):
        cache_path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_replace(cache_path) as path:
            path.write_bytes(data)
    return data


def _matches(data: bytes, sha256: str) -> bool:
    return hashlib.sha256(data).hexdigest() == sha256
