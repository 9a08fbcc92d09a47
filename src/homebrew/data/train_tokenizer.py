"""Train a byte-level BPE on text files with Hugging Face's tokenizers library."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from homebrew.constants import TOKENIZER_FILE
from homebrew.data.byte_pair_tokenizer import MAX_TOKEN_BYTES, BytePairTokenizer
from homebrew.data.gpt2_vocabulary import END_OF_TEXT
from homebrew.data.text_file import text_chunks
from homebrew.data.text_paths import Paths, text_files
from homebrew.data.tiktoken_tokenizer import CHUNK_CHARACTERS
from homebrew.data.tokenizer_json import check_tokenizer_path, write_tokenizer_json
from homebrew.errors import DataError, TokenizerError
from homebrew.integers import as_integer
from homebrew.io import absolute_path
from homebrew.user_warnings import warn

_MIN_SIZE = 257
"""The 256 bytes and the end-of-text token."""

_MAX_SIZE = 2**16
"""Maximum size of a trained vocabulary. A token file stores ids below it in two bytes."""

_MIN_FREQUENCY = 2
"""Number of occurrences that a pair needs to be merged. A model could not learn a token that occurs once."""

_LAST_WORD_BOUNDARY = re.compile(r"(?s:.*)\S(?=[ \t\r\n])")
"""Matches up to the last place where a text can be cut: no word continues from another character into white space."""

_LONG_WORD = re.compile(r"\S{128}|\s{128}")
"""Pieces of long words are cut off as separate words: the library takes minutes for words of a million characters."""


def train_tokenizer(paths: Paths, output: str | Path, *, vocab_size: int) -> BytePairTokenizer:
    """Train a byte-level BPE on text files and write it to a `tokenizer.json`.

    The result depends only on the texts and `vocab_size`. Token 0 is "<|endoftext|>", then come the 256 bytes.

    Args:
        paths: Path of a UTF-8 text file or of a folder (all its .txt and .md files), or a sequence of such paths.
        output: Path of the `.json` file to write, or of a folder in which to write `tokenizer.json`.
        vocab_size: Number of token ids, from 257 to 65,536. There are fewer, with a warning, if the texts have too few
            pairs that occur twice.

    Raises:
        ConfigError: If `vocab_size` is out of range.
        DataError: If a file cannot be read as UTF-8 text, all files are empty, or `output` cannot be written.
        TokenizerError: If the tokenizers library is not installed.
    """
    vocab_size = as_integer("vocab_size", vocab_size, _MIN_SIZE, _MAX_SIZE)
    path = absolute_path(output)
    path = path if path.suffix == ".json" and not path.is_dir() else path / TOKENIZER_FILE
    files = text_files(paths)
    if not any(any(text_chunks(file, CHUNK_CHARACTERS)) for file in files):
        raise DataError("There is no text to train a tokenizer on. Give files that are not empty.")
    check_tokenizer_path(path)
    texts = (text for file in files for text in _cut_between_words(text_chunks(file, CHUNK_CHARACTERS)))
    tokenizer = BytePairTokenizer(_train(texts, vocab_size))
    if tokenizer.vocab_size < vocab_size:
        warn(
            f"The tokenizer has only {tokenizer.vocab_size:,} ids instead of {vocab_size:,}, because no other pair of "
            f"tokens occurs {_MIN_FREQUENCY} times in the words. Give more text, or vocab_size={tokenizer.vocab_size}."
        )
    write_tokenizer_json(tokenizer, path)
    return tokenizer


def _train(texts: Iterable[str], vocab_size: int) -> list[str]:
    """Return the trained tokens by id."""
    try:
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    except ImportError as error:
        raise TokenizerError(
            "Training a tokenizer needs the tokenizers library. Run `pip install -e '.[tokenizers]'` in the cloned "
            "repository, or `pip install tokenizers`."
        ) from error
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=_MIN_FREQUENCY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=MAX_TOKEN_BYTES,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    ids = tokenizer.get_vocab()
    return sorted(ids, key=ids.__getitem__)


def _cut_between_words(chunks: Iterable[str]) -> Iterator[str]:
    """Move the end of each chunk, which may be the beginning of a word, to the next one; cut long words."""
    rest = ""
    for chunk in chunks:
        text = rest + chunk
        match = _LAST_WORD_BOUNDARY.match(text)
        cut = match.end() if match else len(text) if len(text) > CHUNK_CHARACTERS else 0
        yield from _cut_long_words(text[:cut])
        rest = text[cut:]
    yield from _cut_long_words(rest)


def _cut_long_words(text: str) -> Iterator[str]:
    start = 0
    for match in _LONG_WORD.finditer(text):
        yield text[start : match.end()]
        start = match.end()
    yield text[start:]
