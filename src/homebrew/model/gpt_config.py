"""The shape of a GPT."""

from dataclasses import dataclass, replace
from typing import Any, Self

from homebrew.errors import ConfigError

VOCAB_MULTIPLE = 128
"""The head's rows are padded to a multiple of this, so that its matrix product fills whole tiles on a GPU."""

_PRESETS: dict[str, dict[str, int]] = {
    "baby": {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 128},
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
}


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT; the defaults are GPT-2 small's.

    Raises:
        ConfigError: a size is not positive, `n_embd` is not a multiple of `n_head`, or `dropout` is
            not in [0, 1).
    """

    block_size: int = 1024
    """Longest sequence, in tokens."""
    vocab_size: int = 50_257
    """Token ids that exist: 0 to `vocab_size - 1`."""
    n_layer: int = 12
    """Blocks."""
    n_head: int = 12
    """Attention heads in a block."""
    n_embd: int = 768
    """Width of the residual stream."""
    dropout: float = 0.0
    """Probability, in training, of dropping a value of the embedding, the attention or a residual branch."""

    def __post_init__(self) -> None:
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name}={value!r}: must be a whole number of at least 1.")
        if self.n_embd % self.n_head:
            raise ConfigError(
                f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}: every head needs the same "
                f"width. The nearest multiples are {self.n_embd // self.n_head * self.n_head} and "
                f"{(self.n_embd // self.n_head + 1) * self.n_head}."
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"dropout={self.dropout!r}: must be at least 0 and less than 1.")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:  # noqa: ANN401 - any field of the config
        """A named shape: GPT-2's four sizes, or "baby", about 7 M parameters for a CPU.

        Args:
            name: "baby", "gpt2", "gpt2-medium", "gpt2-large" or "gpt2-xl".
            changes: fields to set otherwise.

        Raises:
            ConfigError: no preset has that name.
        """
        if name not in _PRESETS:
            raise ConfigError(f"There is no preset {name!r}. Choose one of: {', '.join(_PRESETS)}.")
        return replace(cls(**_PRESETS[name]), **changes)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and the head in memory; those from `vocab_size` on are never used."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
