"""Tokenize text files of any size into a token file, one chunk at a time."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from homebrew.data.text_file import text_chunks
from homebrew.data.text_paths import Paths, describe_files, text_files
from homebrew.data.tiktoken_tokenizer import CHUNK_CHARACTERS
from homebrew.data.token_file import check_output_path, write_tokens
from homebrew.data.token_formats import is_token_file
from homebrew.data.token_metadata import TokenMetadata
from homebrew.data.tokenizer import CharTokenizer, Tokenizer, encode_chunks, get_tokenizer
from homebrew.errors import DataError
from homebrew.integers import as_integer
from homebrew.io import absolute_path


def prepare(
    paths: Paths,
    output: str | Path,
    *,
    tokenizer: str | Path = "gpt2",
    chunk_characters: int = CHUNK_CHARACTERS,
) -> TokenMetadata:
    """Tokenize text files into one token file.

    The tokens of a text do not depend on the chunk size. Texts are separated by the tokenizer's end-of-text token, if
    it has one.

    Args:
        paths: Path of a UTF-8 text file, of a folder, of which all .txt files are read, or a sequence of such paths.
        output: Path of the `.npy` file to write. An existing token file, valid or damaged, is replaced.
        tokenizer: "gpt2", "bytes", "char" (the characters that occur in the texts), or the path of a `tokenizer.json`.
        chunk_characters: Number of characters to encode at a time.

    Returns:
        The token file's metadata.

    Raises:
        DataError: If a file cannot be read as UTF-8 text, all files are empty, or `output` cannot be written.
    """
    chunk_characters = as_integer("chunk_characters", chunk_characters, error=DataError)
    output = absolute_path(output)
    check_output_path(output)
    chosen = None if tokenizer == "char" else get_tokenizer(tokenizer)  # its errors come before the texts are read
    files = text_files(paths)
    num_bytes, alphabet = 0, set[str]()
    for path in files:
        if is_token_file(path):  # also raises for pipes: the text is read twice
            raise DataError(f"{path} is a token file. Give the text that it was made from, or train on it directly.")
        for chunk in text_chunks(path, chunk_characters):
            num_bytes += len(chunk.encode())
            if chosen is None:
                alphabet.update(chunk)
    if not num_bytes:
        names = ", ".join(map(str, files))
        raise DataError(f"There is no text to prepare{' in ' + names if names else ''}. Give files that are not empty.")
    if chosen is None:
        chosen = CharTokenizer("".join(alphabet))
    return write_tokens(
        output,
        _encode_files(files, chosen, chunk_characters),
        vocab_size=chosen.vocab_size,
        tokenizer_json=chosen.to_json(),
        num_text_bytes=num_bytes,
        source=describe_files(files),
    )


def _encode_files(
    paths: Sequence[str | Path], tokenizer: Tokenizer, chunk_characters: int
) -> Iterator[NDArray[np.int64]]:
    for i, path in enumerate(paths):
        if i and tokenizer.end_of_text_id is not None:
            yield np.array([tokenizer.end_of_text_id])
        yield from encode_chunks(tokenizer, text_chunks(path, chunk_characters))
