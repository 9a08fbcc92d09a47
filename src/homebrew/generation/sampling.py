"""How logits become the next token."""

import math
from dataclasses import dataclass
from typing import SupportsIndex

import torch
from torch import Tensor

from homebrew.errors import ConfigError


def is_whole(value: object) -> bool:
    """Whether this is a whole number, Python's or NumPy's."""
    return isinstance(value, SupportsIndex) and not isinstance(value, bool | Tensor)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen from the logits; applied in this order, as transformers does.

    Raises:
        ConfigError: a value is out of its range.
    """

    repetition_penalty: float = 1.0
    """Divides positive logits of tokens that already occur, multiplies negative ones (Keskar et al. 2019)."""
    temperature: float = 1.0
    """Divides the logits; 0 always takes the likeliest token."""
    top_k: int | None = None
    """Only the k likeliest tokens can be drawn."""
    top_p: float | None = None
    """Only the likeliest tokens that together reach this probability can be drawn (Holtzman et al. 2019)."""
    min_p: float | None = None
    """Only tokens at least this fraction as probable as the likeliest can be drawn (Nguyen et al. 2024)."""

    def __post_init__(self) -> None:
        if not self.repetition_penalty > 0:
            raise ConfigError(f"repetition_penalty={self.repetition_penalty!r}: must be above 0; 1 is no penalty.")
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature={self.temperature!r}: must be at least 0; 0 takes the likeliest token.")
        if self.top_k is not None and not (is_whole(self.top_k) and self.top_k >= 1):
            raise ConfigError(f"top_k={self.top_k!r}: must be a whole number of at least 1; None keeps all tokens.")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ConfigError(f"{name}={value!r}: must be above 0 and at most 1; None keeps all tokens.")

    def adjust(self, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        """Logits whose softmax is the distribution to draw from; tokens that cannot be drawn have -inf.

        Args:
            logits: (B, V), float32.
            seen: (B, V), bool, the tokens that already occur; needed for a repetition penalty.
        """
        if seen is not None and self.repetition_penalty != 1.0:
            penalty = self.repetition_penalty
            logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
        if self.temperature == 0:
            return logits.masked_fill(logits < logits.amax(-1, keepdim=True), -torch.inf)
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            kth = logits.topk(self.top_k, sorted=False).values.amin(-1, keepdim=True)
            logits = logits.masked_fill(logits < kth, -torch.inf)
        if self.top_p is not None:
            ordered, order = logits.sort(descending=True)
            probabilities = ordered.softmax(-1)
            cut = probabilities.cumsum(-1) - probabilities >= self.top_p  # likelier tokens reach it already
            logits = logits.masked_fill(cut.scatter(-1, order, cut), -torch.inf)
        if self.min_p is not None:
            floor = logits.amax(-1, keepdim=True) + math.log(self.min_p)
            logits = logits.masked_fill(logits < floor, -torch.inf)
        return logits

    def choose(self, logits: Tensor, noise: Tensor, seen: Tensor | None = None) -> Tensor:
        """Draw one token for each row, by the Gumbel-max trick: argmax(logits - log E), E exponential.

        Args:
            logits: (B, V), float32.
            noise: (B, V), float32, exponentially distributed.
            seen: as for `adjust`.

        Returns:
            Token ids, (B,), int64.
        """
        logits = self.adjust(logits, seen)
        if self.temperature > 0:
            logits = logits - noise.clamp(min=torch.finfo(noise.dtype).eps / 2).log()
        return logits.argmax(-1)
