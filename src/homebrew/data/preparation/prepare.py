"""Tokenize texts of any size into token files, with several processes.

The input is cut into parts (`plan`). A process (`workers`) encodes each part to separate files (`encode_part`). These
files are joined in the order of the input (`encode_and_write`), so the token files do not depend on the number of
processes.
"""

import hashlib
from collections.abc import Iterator, Sequence
from numbers import Real
from pathlib import Path
from typing import NamedTuple

from homebrew.cores import num_available_cores
from homebrew.data.fast_tokenizer import has_fast_tokenizer
from homebrew.data.preparation.documents import read_documents
from homebrew.data.preparation.encode_and_write import encode_and_write
from homebrew.data.preparation.encode_part import SPLITS, EncodeSettings, Split
from homebrew.data.preparation.joined_parts import no_text_error
from homebrew.data.preparation.plan import Part, plan_parts
from homebrew.data.preparation.shard_writer import ShardWriter
from homebrew.data.preparation.state import PrepareState, RunPlan, output_errors
from homebrew.data.text_paths import PREPARE_SUFFIXES, TEXT_SUFFIXES, Paths, describe_files, expand_paths
from homebrew.data.token_file import check_output_path
from homebrew.data.tokenizer import CharTokenizer, get_tokenizer
from homebrew.errors import DataError
from homebrew.integers import as_integer
from homebrew.io import absolute_path

_MIN_FAST_BYTES = 2**23
"""Input size above which the fast tokenizer saves more time than it takes to load."""

_NUM_SAMPLES = 8
_SAMPLE_CHARACTERS = 2**15
"""Number and length of the texts whose fast encoding is checked."""


class SplitSize(NamedTuple):
    """Size of the token files of a split."""

    num_documents: int
    num_tokens: int
    num_text_bytes: int


def prepare(
    paths: Paths,
    output: str | Path,
    *,
    tokenizer: str | Path = "gpt2",
    text_field: str = "text",
    allow_special: bool = False,
    val_fraction: float = 0.0,
    shard_tokens: int | None = None,
    workers: int | None = None,
    progress: bool = False,
) -> dict[Split, SplitSize]:
    """Tokenize text files into one token file, or into shards.

    A text file is a document, and so is each line of a JSON Lines file and each row of a Parquet file. Documents are
    separated by the tokenizer's end-of-text token, if it has one. The token files do not depend on `workers`. To
    continue an interrupted call, repeat it.

    Args:
        paths: Path of a file, of a folder, a pattern such as "texts/*.txt", or a sequence of them. In a folder, files
            whose names end in .txt, .md, .jsonl, .ndjson, .json, .parquet, .gz or .zst are read. Any other file that is
            named is read as text.
        output: Path of the `.npy` file to write. An existing token file, valid or corrupt, is replaced.
        tokenizer: "gpt2", "bytes", "char" (the characters that occur in the texts), or the path of a `tokenizer.json`.
        text_field: Key or column of the text in JSON Lines and Parquet files.
        allow_special: Whether "<|endoftext|>" in a text separates documents. If not, it is text like any other.
        val_fraction: Expected fraction of the documents that are written to separate token files, for validation. The
            split of a document depends only on a hash of its first 65,536 characters. `book.npy` becomes
            `book-train.npy` and `book-val.npy`.
        shard_tokens: Number of tokens in each file. The files are `book-00000.npy`, `book-00001.npy`, …; the last one
            may be shorter. If None, there is one file.
        workers: Number of processes. If None, it is the number of CPU cores that this process may use.
        progress: Whether to show the progress, if standard error is a terminal.

    Returns:
        The size of "train" and, if `val_fraction` is not 0, of "val".

    Raises:
        DataError: If a file cannot be read, or has a line or row without a valid text; all texts are empty; an
            argument is invalid; or `output` cannot be written.
    """
    workers = as_integer("workers", num_available_cores() if workers is None else workers, error=DataError)
    if shard_tokens is not None:
        shard_tokens = as_integer("shard_tokens", shard_tokens, error=DataError)
    if not isinstance(val_fraction, Real) or isinstance(val_fraction, bool) or not 0 <= val_fraction < 1:
        raise DataError(f"val_fraction={val_fraction!r:.100} is not valid. Use a number from 0 to below 1.")
    output = absolute_path(output)
    outputs = output_paths(output, val_fraction)
    with output_errors(output):
        for path in outputs.values():
            check_output_path(path)
    chosen = None if tokenizer == "char" else get_tokenizer(tokenizer)  # its errors come before the texts are read
    files = expand_paths(paths, (*TEXT_SUFFIXES, *PREPARE_SUFFIXES))
    if not files:
        raise DataError("The list of files is empty. Give at least one file, folder or pattern.")
    source = describe_files(files)
    parts = plan_parts(files, split_at_end_of_text=allow_special)
    alphabet = ""
    if chosen is None:
        alphabet = "".join(sorted(_alphabet(parts, text_field)))
        if not alphabet:
            raise no_text_error(source)
        chosen = CharTokenizer(alphabet)
    if allow_special and chosen.end_of_text_id is None:
        raise DataError(
            f"allow_special=True needs a tokenizer with an end-of-text token, but {chosen.name!r} has none. Leave it "
            f"out, or use another tokenizer."
        )
    state = PrepareState(output)
    is_large = sum(part.num_bytes for part in parts) >= _MIN_FAST_BYTES
    settings = EncodeSettings(
        folder=str(state.folder),
        tokenizer=chosen.to_json(),
        is_fast=is_large and has_fast_tokenizer(chosen, _samples(parts, text_field)),
        text_field=text_field,
        allow_special=allow_special,
        val_fraction=float(val_fraction),
    )
    # The ids of "char" depend on the characters of all parts.
    digests = [hashlib.sha256(f"{part.digest} {alphabet}".encode()).hexdigest()[:16] for part in parts]
    plan = RunPlan(settings.options() | {"shard_tokens": shard_tokens}, digests)
    writers = {split: ShardWriter(path, shard_tokens, chosen, source) for split, path in outputs.items()}
    with state.locked():
        joined = encode_and_write(
            state,
            plan,
            parts,
            settings,
            writers,
            tokenizer=chosen,
            source=source,
            workers=workers,
            progress=progress,
        )
    return {split: SplitSize(joined.num_documents(split), *writer.size()) for split, writer in writers.items()}


def output_paths(output: Path, val_fraction: float) -> dict[Split, Path]:
    """Return the path of the token file of each split, which may be divided into shards."""
    return (
        {split: output.with_stem(f"{output.stem}-{split}") for split in SPLITS} if val_fraction else {"train": output}
    )


def _alphabet(parts: Sequence[Part], text_field: str) -> set[str]:
    """Return the characters of all texts."""
    alphabet = set[str]()
    for part in parts:
        for span in part.spans:
            for document in read_documents(span, text_field, split_at_end_of_text=False):
                alphabet.update(document.text, *document.rest)
    return alphabet


def _samples(parts: Sequence[Part], text_field: str) -> Iterator[str]:
    """Yield the beginnings of texts, spread over the whole input."""
    for part in parts[:: max(1, len(parts) // _NUM_SAMPLES)]:
        document = next(read_documents(part.spans[0], text_field, split_at_end_of_text=False), None)
        if document is not None:
            yield document.text[:_SAMPLE_CHARACTERS]
