"""`homebrew tokenizer train`: train a tokenizer on text files."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg


@dataclass
class Tokenizer:
    """Train a byte-level BPE, a tokenizer like GPT-2's, on text files, and write it to a tokenizer.json.

    For a small model or a small text, a few thousand tokens are enough, where GPT-2's tokenizer has 50,257. Hugging
    Face's tokenizers and transformers open the file too.
    """

    action: Positional[Annotated[Literal["train"], arg(metavar="train", help_behavior_hint="(required)")]]
    """What to do."""
    texts: Positional[Annotated[tuple[Path, ...], arg(metavar="TEXT [TEXT ...]", help_behavior_hint="(required)")]]
    """UTF-8 text files, or folders of .txt and .md files."""
    vocab_size: int
    """Number of tokens, from 257 to 65536."""
    output: Path
    """File to write, such as tokenizer.json, or a folder to write tokenizer.json to."""

    def run(self) -> None:
        """Write the tokenizer and print how to use it."""
        from homebrew.data.train_tokenizer import train_tokenizer

        tokenizer = train_tokenizer(self.texts, self.output, vocab_size=self.vocab_size)
        print(f"{self.output}: {tokenizer.vocab_size:,} tokens.")
        options = ["--tokenizer", str(self.output), "--output", "tokens.npy"]
        print(f"To tokenize the text: {shlex.join(['homebrew', 'prepare', *map(str, self.texts), *options])}")
