"""Sampling: choose the next token from the logits."""

import math
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from homebrew.errors import ConfigError
from homebrew.integers import is_integer


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _factor(value: float) -> float:
    """Return a factor for logits, limited to a range in which float32 neither overflows nor underflows."""
    return float(min(max(value, 1e-20), 1e20))


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to choose the next token.

    The options are applied in the order of the fields, as in transformers.

    Raises:
        ConfigError: A value has the wrong type or is out of range.
    """

    repetition_penalty: float = 1.0
    """Makes tokens that already occur less likely if above 1: their positive logits are divided by it, their
    negative ones multiplied (Keskar et al. 2019)."""
    temperature: float = 1.0
    """Divides the logits. 0 always takes the most likely token (greedy decoding)."""
    top_k: int | None = None
    """Sample from the k most likely tokens only."""
    top_p: float | None = None
    """Sample from the smallest set of most likely tokens whose probabilities sum to `top_p` (Holtzman et al. 2019)."""
    min_p: float | None = None
    """Sample only from tokens at least `min_p` times as likely as the most likely token (Nguyen et al. 2024)."""

    def __post_init__(self) -> None:
        if not (_is_number(self.repetition_penalty) and 0 < self.repetition_penalty < math.inf):
            raise ConfigError(
                f"repetition_penalty={self.repetition_penalty!r} is not valid. Use a number above 0; 1 is no penalty."
            )
        if not (_is_number(self.temperature) and 0 <= self.temperature < math.inf):
            raise ConfigError(
                f"temperature={self.temperature!r} is not valid. Use a number of at least 0; 0 is greedy decoding."
            )
        if self.top_k is not None and not (is_integer(self.top_k) and self.top_k >= 1):
            raise ConfigError(
                f"top_k={self.top_k!r} is not valid. Use an integer of at least 1, or None to keep all tokens."
            )
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and 0 < value <= 1 and float(value) > 0):
                raise ConfigError(
                    f"{name}={value!r} is not valid. Use a number above 0 and at most 1, or None to keep all tokens."
                )

    def process_logits(self, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        """Return logits whose softmax is the distribution to sample from. Excluded tokens have -inf.

        Args:
            logits: Logits of the model, (B, V), float32.
            seen: Tokens that already occur in each sequence, (B, V), bool. Required for a repetition penalty.

        Returns:
            Tensor of shape (B, V), float32.
        """
        if seen is not None and self.repetition_penalty != 1.0:
            penalty = _factor(self.repetition_penalty)
            logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
        if self.temperature == 0:
            return logits.masked_fill(logits < logits.amax(-1, keepdim=True), -torch.inf)
        # Relative to the largest logit, so that a tiny temperature gives -inf for the others instead of inf.
        logits = (logits - logits.amax(-1, keepdim=True)) / _factor(self.temperature)
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            kth = logits.topk(int(self.top_k), sorted=False).values.amin(-1, keepdim=True)
            logits = logits.masked_fill(logits < kth, -torch.inf)
        if self.top_p is not None:
            ordered, order = logits.sort(descending=True)
            probabilities = ordered.softmax(-1)
            excluded = probabilities.cumsum(-1) - probabilities >= float(self.top_p)  # top_p is reached without them
            excluded[..., 0] = False  # top_p may be 0 in float32
            logits = logits.masked_fill(excluded.scatter(-1, order, excluded), -torch.inf)
        if self.min_p is not None:
            threshold = logits.amax(-1, keepdim=True) + math.log(self.min_p)
            logits = logits.masked_fill(logits < threshold, -torch.inf)
        return logits

    def sample(self, logits: Tensor, noise: Tensor, seen: Tensor | None = None) -> Tensor:
        """Sample one token per row, by the Gumbel-max trick: argmax(logits - log(noise)).

        Args:
            logits: Logits of the model, (B, V), float32.
            noise: Exponentially distributed noise, (B, V), float32.
            seen: As in `process_logits`.

        Returns:
            Token ids, (B,), int64.
        """
        logits = self.process_logits(logits, seen)
        if self.temperature > 0:
            logits = logits - noise.clamp(min=torch.finfo(noise.dtype).eps / 2).log()
        return logits.argmax(-1)
