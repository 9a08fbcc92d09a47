"""Loss, perplexity and bits per byte of a text, computed over strided windows."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from homebrew.constants import IGNORE_INDEX
from homebrew.data.tokenizer import Tokenizer, check_tokenizer
from homebrew.errors import ConfigError, DataError, ModelError
from homebrew.integers import as_integer, is_integer
from homebrew.model.gpt import GPT, check_gpt
from homebrew.model.passes import eval_mode, uncompiled

ProgressFn = Callable[[Sequence[int]], Iterable[int]]
"""Wraps a sequence of batch indices to display progress, such as `rich.progress.track`; `iter` displays nothing."""


@dataclass(frozen=True)
class TextScore:
    """Result of `score_text`."""

    nats: float
    """Total loss over all scored tokens, in nats."""
    num_tokens: int
    """Number of scored tokens: all except the first, which has no context."""
    num_bytes: int
    """Number of UTF-8 bytes of the scored tokens."""

    @property
    def loss(self) -> float:
        """Mean loss in nats per token."""
        return self.nats / self.num_tokens

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss) if self.loss < 700 else math.inf  # exp overflows above 709

    @property
    def bits_per_byte(self) -> float:
        """Total loss in bits per byte of text, comparable across tokenizers."""
        return self.nats / math.log(2) / self.num_bytes


@torch.no_grad()
def score_text(
    model: GPT,
    tokenizer: Tokenizer,
    text: str,
    *,
    stride: int | None = None,
    batch_size: int = 8,
    progress: ProgressFn = iter,
) -> TextScore:
    """Compute a model's loss on a text by strided windows.

    Windows of `block_size` inputs start every `stride` tokens, and each window scores only the tokens that the
    previous one has not scored, as in transformers' guide to perplexity. Each token is therefore scored once, with at
    least `block_size - stride + 1` tokens of context, except at the start of the text. The last window ends with the
    text.

    Args:
        model: Model to evaluate. Its training mode is restored afterwards.
        tokenizer: Tokenizer the model was trained with.
        text: Text to score.
        stride: Number of tokens between the starts of two windows. A smaller stride gives more context per token and
            takes longer; with `block_size`, windows do not overlap. Default: half of `block_size`.
        batch_size: Number of windows per forward pass.
        progress: Wraps the iterable of batches, for example to display a progress bar.

    Raises:
        ConfigError: `stride` or `batch_size` is out of range, or the tokenizer is not a `Tokenizer`.
        DataError: The text has fewer than two tokens.
        ModelError: The model is not a GPT, or the text has token ids outside its vocabulary.
    """
    check_gpt(model, "score_text")
    check_tokenizer(tokenizer)
    block_size = model.config.block_size
    stride = max(1, block_size // 2) if stride is None else stride
    if not (is_integer(stride) and 1 <= stride <= block_size):
        raise ConfigError(f"stride={stride!r}: must be an integer from 1 to the model's block_size, {block_size}.")
    batch_size = as_integer("batch_size", batch_size)
    ids = torch.from_numpy(tokenizer.encode(text))
    if len(ids) < 2:
        raise DataError(f"The text has {len(ids)} token(s), but scoring needs at least 2. Use a longer text.")
    if int(ids.max()) >= model.config.vocab_size:
        raise ModelError(
            f"The text has token id {int(ids.max())}, but the model's vocab_size is {model.config.vocab_size}. Use the "
            f"tokenizer the model was trained with."
        )
    window_length = min(block_size, len(ids) - 1)  # inputs of a window; its targets are shifted by one
    last_start = len(ids) - 1 - window_length
    starts = torch.tensor([*range(0, last_start, stride), last_start])
    # Tokens scored before each window. The first token counts as scored, because it is never a target.
    num_scored = torch.cat([torch.tensor([1]), starts[:-1] + window_length + 1])
    windows = ids.unfold(0, window_length + 1, 1)
    nats, num_tokens = 0.0, 0
    with eval_mode(model), uncompiled(model):  # shapes differ between texts, and in a text's last batch
        for start in progress(range(0, len(starts), batch_size)):
            batch = slice(start, start + batch_size)
            window = windows[starts[batch]]  # (B, window_length + 1)
            positions = starts[batch, None] + torch.arange(1, window_length + 1)
            targets = window[:, 1:].masked_fill(positions < num_scored[batch, None], IGNORE_INDEX)
            num_targets = int((targets != IGNORE_INDEX).sum())
            nats += model(window[:, :-1].to(model.device), targets.to(model.device)).item() * num_targets
            num_tokens += num_targets
    num_bytes = len(text.encode()) - len(tokenizer.decode_bytes(ids[:1].tolist()))
    return TextScore(nats, num_tokens, num_bytes)
