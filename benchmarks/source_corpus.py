"""Training data that every machine has: the Python source code of the installed packages, as GPT-2 tokens."""

import hashlib
import json
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from homebrew import TokenDataset, get_tokenizer
from homebrew.cores import num_available_cores
from homebrew.data.text_file import read_text
from homebrew.data.token_file import write_tokens
from homebrew.errors import DataError
from homebrew.io import strict_json

VALIDATION_EVERY = 200
"""The first file and every 200th after it are validation data."""


@dataclass(frozen=True)
class SourceCorpus:
    """Two token files in a folder, and what is in them."""

    folder: Path
    description: dict[str, Any]
    """Number of files and tokens, and hashes: of the list of files (`source-files.txt`) and of both token files."""

    def dataset(self, split: str, block_size: int) -> TokenDataset:
        """Open "train" or "validation"."""
        return TokenDataset.from_shards(self.folder / f"source-{split}.npy", block_size)


def build_source_corpus(
    folder: Path, *, max_tokens: int, root: Path | None = None, workers: int | None = None
) -> SourceCorpus:
    """Tokenize all `.py` files below `root` into `folder`, or return what an earlier call has written.

    Files are read in the order of their relative paths, until `max_tokens` is reached. Empty files and files that are
    not UTF-8 text are left out. "<|endoftext|>" separates two files. The result does not depend on the number of
    processes. By default, `root` is the site-packages folder of PyTorch, and there is a process for each core.
    """
    root = Path(torch.__file__).parents[1] if root is None else root
    candidates = _list_files(root)
    key = {"max_tokens": max_tokens, "candidates_sha256": _sha256(candidates)}
    record = folder / "source-corpus.json"
    if record.exists():
        saved = json.loads(record.read_text(encoding="utf-8"))
        if saved["key"] == key:
            return SourceCorpus(folder, saved["description"])

    tokenizer = get_tokenizer("gpt2")
    separator = np.array([tokenizer.end_of_text_id], dtype=np.uint16)
    parts: dict[str, list[NDArray[np.uint16]]] = {"train": [], "validation": []}
    files: list[tuple[str, int]] = []
    num_tokens = 0
    # Not forked: a fork copies the locks that other threads hold.
    with get_context("spawn").Pool(workers or num_available_cores()) as pool:
        encoded = pool.imap(_encode, [root / path for path, _ in candidates], chunksize=32)
        for file, ids in zip(candidates, encoded, strict=True):
            if ids is None:
                continue
            split = parts["train" if len(files) % VALIDATION_EVERY else "validation"]
            files.append(file)
            split.extend([separator, ids] if split else [ids])
            num_tokens += len(ids)
            if num_tokens >= max_tokens:
                break

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "source-files.txt").write_bytes(_lines(files))
    description: dict[str, Any] = {"corpus": "source", "files": len(files), "files_sha256": _sha256(files)}
    for name, arrays in parts.items():
        about = {"vocab_size": tokenizer.vocab_size, "tokenizer_json": tokenizer.to_json()}
        source = "source code of the installed packages"
        metadata = write_tokens(folder / f"source-{name}.npy", arrays, **about, source=source)
        description |= {f"{name}_tokens": metadata.num_tokens, f"{name}_sha256": metadata.sha256}
    record.write_text(strict_json({"key": key, "description": description}, indent=2) + "\n", encoding="utf-8")
    return SourceCorpus(folder, description)


def _list_files(root: Path) -> list[tuple[str, int]]:
    """Return the relative path and the size in bytes of each `.py` file that is not empty, sorted by path."""
    files = [(path.relative_to(root).as_posix(), path.stat().st_size) for path in root.rglob("*.py") if path.is_file()]
    return sorted((path, size) for path, size in files if size)


def _lines(files: list[tuple[str, int]]) -> bytes:
    return "".join(f"{size} {path}\n" for path, size in files).encode(errors="surrogateescape")


def _sha256(files: list[tuple[str, int]]) -> str:
    return hashlib.sha256(_lines(files)).hexdigest()


def _encode(path: Path) -> NDArray[np.uint16] | None:
    """Return the tokens of a file, or None if it is not text."""
    try:
        text = read_text(path)
    except DataError:
        return None
    return get_tokenizer("gpt2").encode(text).astype(np.uint16)
