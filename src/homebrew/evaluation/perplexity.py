"""How well a model predicts a text: loss, perplexity and bits per byte, by windows that overlap."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from homebrew.constants import IGNORE_INDEX
from homebrew.data.tokenizer import Tokenizer
from homebrew.errors import ConfigError, DataError, ModelError
from homebrew.generation.generate import eval_mode
from homebrew.model.gpt import GPT

Track = Callable[[Sequence[int]], Iterable[int]]
"""Passes batch numbers on, and may show how far it is: `rich.progress.track`, or `iter` for nothing."""


@dataclass(frozen=True)
class TextScore:
    """What a model makes of a text."""

    nats: float
    """Summed over all scored tokens."""
    num_tokens: int
    """Scored: all but the first, which nothing precedes."""
    num_bytes: int
    """UTF-8 bytes that the scored tokens stand for."""

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / self.num_tokens

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers."""
        return self.nats / math.log(2) / self.num_bytes


@torch.no_grad()
def score_text(
    model: GPT,
    tokenizer: Tokenizer,
    text: str,
    *,
    stride: int | None = None,
    batch_size: int = 8,
    track: Track = iter,
) -> TextScore:
    """Predict every token of a text once, each from at least `block_size - stride + 1` tokens before it.

    Windows of `block_size` inputs start every `stride` tokens, and each scores only what the one before has not
    (the strided windows of transformers' guide to perplexity). The last is moved back to end with the text.

    Args:
        model: the model; its training mode is as before afterwards.
        tokenizer: the one it was trained with.
        text: what to predict.
        stride: tokens between windows: fewer cost more and give each token more context; half of `block_size` if
            not given. With `block_size` windows do not overlap.
        batch_size: windows at once.
        track: is given the batches' numbers.

    Raises:
        ConfigError: `stride` or `batch_size` is out of range.
        DataError: the text has fewer than two tokens.
        ModelError: the tokenizer has ids that the model does not know.
    """
    block_size = model.config.block_size
    stride = max(1, block_size // 2) if stride is None else stride
    if not 1 <= stride <= block_size or batch_size < 1:
        raise ConfigError(
            f"stride={stride} must be from 1 to the model's block_size, {block_size}, and batch_size={batch_size} at "
            f"least 1."
        )
    ids = torch.from_numpy(tokenizer.encode(text))
    if len(ids) < 2:
        raise DataError(f"The text has {len(ids)} token(s): there must be two for one to be predicted.")
    if int(ids.max()) >= model.config.vocab_size:
        raise ModelError(
            f"The text has token id {int(ids.max())}, but the model's vocab_size is {model.config.vocab_size}: use the "
            f"tokenizer the model was trained with."
        )
    length = min(block_size, len(ids) - 1)  # of a window's inputs; its targets are one further
    last = len(ids) - 1 - length
    starts = torch.tensor([*range(0, last, stride), last])
    scored_before = torch.cat([torch.ones(1, dtype=torch.int64), starts[:-1] + length + 1])  # tokens
    windows = ids.unfold(0, length + 1, 1)
    nats, num_tokens = 0.0, 0
    with eval_mode(model):
        for i in track(range(0, len(starts), batch_size)):
            rows = slice(i, i + batch_size)
            window = windows[starts[rows]]  # (B, length + 1)
            positions = starts[rows, None] + torch.arange(1, length + 1)
            targets = window[:, 1:].masked_fill(positions < scored_before[rows, None], IGNORE_INDEX)
            count = int((targets != IGNORE_INDEX).sum())
            nats += model(window[:, :-1].to(model.device), targets.to(model.device)).item() * count
            num_tokens += count
    num_bytes = len(text.encode()) - len(tokenizer.decode_bytes(ids[:1].tolist()))
    return TextScore(nats, num_tokens, num_bytes)
