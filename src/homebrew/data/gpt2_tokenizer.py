"""GPT-2's byte-pair encoding."""

import json
from functools import cache
from typing import Any

import tiktoken

from homebrew.data.gpt2_vocabulary import END_OF_TEXT, gpt2_vocabulary_file
from homebrew.data.tiktoken_tokenizer import TiktokenTokenizer, build_encoding, from_notation

_END_OF_TEXT_ID = 50_256


class GPT2Tokenizer(TiktokenTokenizer):
    """GPT-2's byte-pair encoding with 50,257 ids. "<|endoftext|>" in a text is encoded as ordinary text."""

    name = "gpt2"
    vocab_size = 50_257
    end_of_text_id: int | None = _END_OF_TEXT_ID

    def __init__(self) -> None:
        super().__init__(_gpt2_encoding())

    def to_json(self) -> dict[str, Any]:
        """Return the tokenizer's name."""
        return {"name": self.name}


@cache
def _gpt2_encoding() -> tiktoken.Encoding:
    """Build tiktoken's encoding from a local file. tiktoken's own loader downloads without a timeout."""
    ids: dict[str, int] = json.loads(gpt2_vocabulary_file("encoder.json"))
    ids.pop(END_OF_TEXT)
    return build_encoding({from_notation(token): i for token, i in ids.items()}, _END_OF_TEXT_ID)
