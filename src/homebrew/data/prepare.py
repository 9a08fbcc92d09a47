"""Texts of any size to a token file, a piece at a time."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from homebrew.data.text_file import unreadable
from homebrew.data.token_file import TokenHeader, check_replaceable, is_token_file, write_tokens
from homebrew.data.tokenizer import Tokenizer, get_tokenizer
from homebrew.errors import DataError

PIECE_CHARACTERS = 2**22
"""Read and encoded at once; what tiktoken needs for them is some hundred MB."""

_UP_TO_CUT = re.compile(r".*\S(?=[ \t\n])", re.DOTALL)
"""No token of GPT-2 goes across white space that follows a word: its pattern takes it into the next."""


def prepare(
    paths: Sequence[str | Path],
    output: str | Path,
    *,
    tokenizer: str = "gpt2",
    piece_characters: int = PIECE_CHARACTERS,
) -> TokenHeader:
    """Write the tokens of texts, one after the other, to a token file.

    Where the tokenizer has an end-of-text id it stands between two texts. The tokens of one text are those of
    encoding it at once.

    Args:
        paths: UTF-8 text files.
        output: the token file; one that is there is replaced, a file of another kind is not.
        tokenizer: "gpt2", "bytes" or "char" (the characters that occur in the texts).
        piece_characters: read at once.

    Returns:
        The file's header.

    Raises:
        DataError: a file cannot be read as UTF-8 text, all are empty, or `output` cannot be written.
    """
    check_replaceable(Path(output))
    num_bytes, alphabet = 0, set[str]()
    for path in paths:
        if os.path.exists(path) and not os.path.isfile(path):  # noqa: PTH110, PTH113 - False for impossible names
            raise DataError(f"{path} is not a regular file, and the text is read twice: write it to a file first.")
        if os.path.isfile(path) and is_token_file(path):  # noqa: PTH113
            raise DataError(f"{path} is a token file already: give the text that it was made of, or train on it.")
        for piece in text_pieces(path, piece_characters):
            num_bytes += len(piece.encode())
            if tokenizer == "char":
                alphabet.update(piece)
    if not num_bytes:
        raise DataError(f"{', '.join(map(str, paths)) or 'No file'}: there is no text to prepare.")
    chosen = get_tokenizer(tokenizer, text="".join(alphabet))
    more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
    return write_tokens(
        output,
        _encoded(paths, chosen, piece_characters),
        vocab_size=chosen.vocab_size,
        tokenizer_json=chosen.to_json(),
        num_text_bytes=num_bytes,
        source=f"the file {paths[0]}{more}",
    )


def text_pieces(path: str | Path, piece_characters: int = PIECE_CHARACTERS) -> Iterator[str]:
    """A text in pieces that can be encoded one by one.

    Args:
        path: a UTF-8 text file.
        piece_characters: read at once.

    Yields:
        Pieces that together are the text, cut before white space; none is empty.

    Raises:
        DataError: the file cannot be read as UTF-8 text.
    """
    held = ""
    try:
        with Path(path).open(encoding="utf-8") as file:
            while new := file.read(piece_characters):
                searched = max(len(held) - 1, 0)
                held += new
                if match := _UP_TO_CUT.match(held, searched):
                    yield held[: match.end()]
                    held = held[match.end() :]
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(path, error) from error
    if held:
        yield held


def _encoded(paths: Sequence[str | Path], tokenizer: Tokenizer, piece_characters: int) -> Iterator[NDArray[np.int64]]:
    for number, path in enumerate(paths):
        if number and tokenizer.end_of_text_id is not None:
            yield np.array([tokenizer.end_of_text_id])
        for piece in text_pieces(path, piece_characters):
            yield tokenizer.encode(piece)
