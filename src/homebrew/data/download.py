"""Where bytes come from: an installed package, a cache, the network; each checked against a SHA-256."""

import contextlib
import hashlib
import http.client
import importlib.metadata
import os
import urllib.request
from pathlib import Path

from homebrew.io import atomic_replace

TIMEOUT_SECONDS = 5.0
"""How long the network may keep silent."""


def cache_dir() -> Path:
    """Where downloads are kept: `$HOMEBREW_GPT_CACHE`, else `homebrew-gpt` in the user's cache folder."""
    if own := os.environ.get("HOMEBREW_GPT_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "homebrew-gpt"


def checked(data: bytes | None, sha256: str) -> bytes | None:
    """The bytes, if they are the ones that were meant."""
    return data if data is not None and hashlib.sha256(data).hexdigest() == sha256 else None


def read_file(path: Path) -> bytes | None:
    """A file's bytes, None where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError:
        return None


def installed_files(distribution: str, suffix: str) -> list[Path]:
    """Files of an installed distribution whose path ends in `suffix`, sorted; the package is not imported."""
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return sorted(Path(str(file.locate())) for file in files if str(file).endswith(suffix))


def download(url: str, sha256: str, keep_at: Path) -> bytes | None:
    """Fetch a URL and keep the bytes in a cache; None where that fails or they are not the ones that were meant."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response:  # noqa: S310 - our own constants
            data = checked(response.read(16 * 1024**2), sha256)
    except (OSError, http.client.HTTPException):
        return None
    if data is not None:
        with contextlib.suppress(OSError):  # a cache that cannot be written costs only the next download
            keep_at.parent.mkdir(parents=True, exist_ok=True)
            with atomic_replace(keep_at) as path:
                path.write_bytes(data)
    return data
