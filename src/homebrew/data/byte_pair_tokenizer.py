"""A byte-level byte-pair encoding with any vocabulary."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from homebrew.data.gpt2_vocabulary import END_OF_TEXT
from homebrew.data.tiktoken_tokenizer import TiktokenTokenizer, build_encoding, from_notation
from homebrew.errors import DataError

MAX_TOKEN_BYTES = 128
"""Maximum length of a token. GPT-2's longest has 128 bytes. The time to check a token grows with its square."""

_MAX_VOCABULARY_BYTES = 2**20
"""Maximum total length of the tokens, so that a checkpoint's `state.json` can be read. GPT-2's tokens have 0.3 MB."""


class BytePairTokenizer(TiktokenTokenizer):
    """A byte-level byte-pair encoding, which `train_tokenizer` makes and `get_tokenizer(path)` opens.

    Words are split as by GPT-2. "<|endoftext|>" in a text is encoded as ordinary text.

    Args:
        tokens: Tokens in the order of their ids, in the notation of GPT-2's vocabulary files: the 256 bytes, merges of
            two tokens in the order of the merges, and "<|endoftext|>", if the tokenizer has it.

    Raises:
        DataError: If the tokens do not form a byte-level byte-pair encoding.
    """

    name = "bpe"

    def __init__(self, tokens: Sequence[str]) -> None:
        self.tokens = tuple(tokens)
        ids = _ids_by_bytes(self.tokens)
        self.merges = find_merges(ids)  # raises if tiktoken, which merges by id, would merge in another order
        end_of_text_id = self.tokens.index(END_OF_TEXT) if END_OF_TEXT in self.tokens else None
        super().__init__(build_encoding(ids, end_of_text_id))

    def to_json(self) -> dict[str, Any]:
        """Return the tokenizer's name and tokens."""
        return {"name": self.name, "tokens": list(self.tokens)}


def find_merges(ids: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """For each token of several bytes, in the order of ids, return the two tokens that are merged into it.

    The merges follow from the tokens: ids are in the order of the merges, so the pair that makes a token is what
    remains of its bytes after the merges of all lower ids.

    Raises:
        DataError: If a token is not the merge of two other tokens.
    """
    merges = []
    for token in sorted(ids, key=ids.__getitem__):
        if len(token) > 1:
            parts = _apply_earlier_merges(token, ids)
            if len(parts) != 2 or not ids.keys() >= set(parts):
                raise DataError(
                    f"Token {ids[token]} ({token.decode(errors='replace')!r}) is not the merge of two tokens with "
                    f"lower ids. Use a byte-level byte-pair encoding whose ids are in the order of its merges."
                )
            merges.append((parts[0], parts[1]))
    return merges


def _apply_earlier_merges(token: bytes, ids: Mapping[bytes, int]) -> list[bytes]:
    """Split a token into bytes and apply the merges of all lower ids."""
    parts = [bytes([byte]) for byte in token]
    while True:
        pair_ids = [ids.get(a + b, len(ids) + 1) for a, b in itertools.pairwise(parts)]
        lowest = min(pair_ids, default=ids[token])
        if lowest >= ids[token]:
            return parts
        i = pair_ids.index(lowest)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def _ids_by_bytes(tokens: Sequence[str]) -> dict[bytes, int]:
    """Return the ids of all tokens except "<|endoftext|>"."""
    ids: dict[bytes, int] = {}
    for i, token in enumerate(tokens):
        if token == END_OF_TEXT:
            continue
        try:
            data = from_notation(token)
        except KeyError:
            data = b""
        if not 0 < len(data) <= MAX_TOKEN_BYTES:
            raise DataError(
                f"Token {i}, {token!r:.200}, is not 1 to {MAX_TOKEN_BYTES} bytes in the notation of GPT-2's vocabulary "
                f"files. Use a byte-level byte-pair encoding."
            )
        ids[data] = i
    if len(set(tokens)) < len(tokens):
        raise DataError("Several tokens are equal. Every token of a byte-pair encoding has one id.")
    if (num_bytes := sum(map(len, ids))) > _MAX_VOCABULARY_BYTES:
        raise DataError(
            f"The tokens have {num_bytes:,} bytes together, but at most {_MAX_VOCABULARY_BYTES:,} are supported. Use a "
            f"smaller vocabulary."
        )
    if missing := [byte for byte in range(256) if bytes([byte]) not in ids]:
        raise DataError(
            f"{len(missing)} of the 256 bytes are not tokens, so not every text can be encoded. Train the tokenizer "
            f"again with `homebrew tokenizer train`, or with the initial alphabet ByteLevel.alphabet()."
        )
    return ids
