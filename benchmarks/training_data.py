"""Training data of the benchmarks: Tiny Shakespeare, and the Python source code of the installed packages."""

import hashlib
import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from homebrew import TokenDataset, get_tokenizer, load_corpus
from homebrew.cores import num_available_cores
from homebrew.data.text_file import read_text
from homebrew.data.token_file import write_tokens
from homebrew.errors import DataError
from homebrew.io import strict_json

Data = tuple[TokenDataset, TokenDataset, dict[str, Any]]
"""Training data, validation data and a description of the corpus."""

VALIDATION_EVERY = 200
"""The first source file and every 200th after it are validation data."""


def shakespeare(path: Path | None, block_size: int, *, stride: int | None) -> Data:
    """Return the characters of Tiny Shakespeare, the last 10 % for validation. `stride` is that of the training data.

    By default, the text is downloaded and cached.
    """
    corpus = load_corpus("tinyshakespeare", path=path)
    tokenizer = get_tokenizer("char", text=corpus.text)
    split = int(0.9 * len(corpus.text))
    train = TokenDataset.from_text(corpus.text[:split], block_size, tokenizer=tokenizer, stride=stride)
    val = TokenDataset.from_text(corpus.text[split:], block_size, tokenizer=tokenizer)
    return train, val, {"corpus": corpus.source, "sha256": corpus.sha256}


def source_code(
    folder: Path, block_size: int, *, max_tokens: int, root: Path | None = None, workers: int | None = None
) -> Data:
    """Tokenize all `.py` files below `root` into `folder`, or open what an earlier call has written.

    Files are read in the order of their relative paths, until `max_tokens` is reached. Empty files and files that are
    not UTF-8 text are left out. "<|endoftext|>" separates two files. The result does not depend on the number of
    processes. By default, `root` is the site-packages folder of PyTorch, and there is a process for each core.

    The description has the number of files and tokens, and hashes: of the list of files, which is written to
    `source-files.txt`, and of both token files.
    """
    root = Path(torch.__file__).parents[1] if root is None else root
    files = [(path.relative_to(root).as_posix(), path.stat().st_size) for path in root.rglob("*.py") if path.is_file()]
    candidates = sorted((path, size) for path, size in files if size)
    key = {"max_tokens": max_tokens, "candidates_sha256": _sha256(candidates)}
    record = folder / "source-corpus.json"
    saved = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    if saved.get("key") != key:
        description = _tokenize(folder, root, candidates, max_tokens, workers or num_available_cores())
        saved = {"key": key, "description": description}
        record.write_text(strict_json(saved, indent=2) + "\n", encoding="utf-8")
    train, val = (
        TokenDataset.from_shards(folder / f"source-{split}.npy", block_size) for split in ("train", "validation")
    )
    return train, val, saved["description"]


def _tokenize(
    folder: Path, root: Path, candidates: list[tuple[str, int]], max_tokens: int, workers: int
) -> dict[str, Any]:
    """Write the token files and the list of files, and return the description."""
    tokenizer = get_tokenizer("gpt2")
    separator = np.array([tokenizer.end_of_text_id], dtype=np.uint16)
    parts: dict[str, list[NDArray[np.uint16]]] = {"train": [], "validation": []}
    files: list[tuple[str, int]] = []
    num_tokens = 0
    # Not forked: a fork copies the locks that other threads hold. And not a `Pool`: it can hang if it is terminated
    # before its last result (python/cpython#96995).
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        encoded = pool.map(_encode, [root / path for path, _ in candidates], chunksize=32)
        try:
            for file, ids in zip(candidates, encoded, strict=True):
                if ids is None:
                    continue
                split = parts["train" if len(files) % VALIDATION_EVERY else "validation"]
                files.append(file)
                split.extend([separator, ids] if split else [ids])
                num_tokens += len(ids)
                if num_tokens >= max_tokens:
                    break
        finally:
            pool.shutdown(cancel_futures=True)

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "source-files.txt").write_bytes(_lines(files))
    description: dict[str, Any] = {"corpus": "source", "files": len(files), "files_sha256": _sha256(files)}
    for name, arrays in parts.items():
        about = {"vocab_size": tokenizer.vocab_size, "tokenizer_json": tokenizer.to_json()}
        source = "source code of the installed packages"
        metadata = write_tokens(folder / f"source-{name}.npy", arrays, **about, source=source)
        description |= {f"{name}_tokens": metadata.num_tokens, f"{name}_sha256": metadata.sha256}
    return description


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
