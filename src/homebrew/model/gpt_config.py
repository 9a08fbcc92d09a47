"""The configuration of a GPT."""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Self

from homebrew.errors import ConfigError

if TYPE_CHECKING:
    from homebrew.data.tokenizer import Tokenizer

VOCAB_MULTIPLE = 128
"""The vocabulary is padded to a multiple of this, so that the head's matrix product fills whole tiles on a GPU."""

EMBEDDING = "transformer.wte.weight"
"""State dict key of the token embedding, (padded_vocab_size, n_embd)."""

POSITION_EMBEDDING = "transformer.wpe.weight"
"""State dict key of the position embedding, (block_size, n_embd)."""

LM_HEAD = "lm_head.weight"
"""State dict key of the output head, which shares the token embedding's weight."""

NO_EOS = -1
"""Value of `eos_token_id` for a model in which no id ends a text."""

MAX_SIZE = 2**24
"""Maximum of each size, far above that of any model. It ensures that products of sizes do not overflow int64."""

Init = Literal["gpt2", "local"]
"""How weights are initialized: as in GPT-2, or so that attention first looks at equal and at nearby tokens."""

_PRESETS: dict[str, dict[str, int]] = {
    "char": {"n_layer": 2, "n_head": 4, "n_embd": 128, "block_size": 64},
    "baby": {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 128},
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
}


@dataclass(frozen=True)
class GPTConfig:
    """The configuration of a GPT. The defaults are those of GPT-2 small.

    Raises:
        ConfigError: A size is not a positive integer, `n_embd` is not a multiple of `n_head`, `dropout` is not in
            [0, 1), or `eos_token_id` is not an id of the vocabulary.
    """

    block_size: int = 1024
    """Maximum sequence length, in tokens."""
    vocab_size: int = 50_257
    """Number of token ids. Valid ids are 0 to `vocab_size - 1`."""
    n_layer: int = 12
    """Number of transformer blocks."""
    n_head: int = 12
    """Number of attention heads in each block."""
    n_embd: int = 768
    """Width of the residual stream (embedding dimension)."""
    dropout: float = 0.0
    """Dropout probability for embeddings, attention weights and residual branches during training."""
    eos_token_id: int | None = field(default=None, compare=False)  # changes no computation of the model
    """Id that ends a generated text. If None, it is the tokenizer's end-of-text token, if there is one. If -1, no id
    ends a text."""

    def __post_init__(self) -> None:
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= MAX_SIZE:
                raise ConfigError(f"{name}={value!r:.100} is not valid. Use an integer from 1 to {MAX_SIZE:,}.")
        if self.n_embd % self.n_head:
            lower = self.n_embd // self.n_head * self.n_head
            raise ConfigError(
                f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}, so the heads cannot have equal "
                f"widths. The nearest multiples are {lower} and {lower + self.n_head}."
            )
        check_dropout(self.dropout)
        eos = self.eos_token_id
        if eos is not None and not (type(eos) is int and NO_EOS <= eos < self.vocab_size):
            raise ConfigError(
                f"eos_token_id={eos!r} is not valid. Use an id of the vocabulary, 0 to {self.vocab_size - 1}, None, or "
                f"{NO_EOS}, with which no text ends."
            )

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:  # noqa: ANN401 - any field of the config
        """Return a named configuration.

        Args:
            name: "gpt2", "gpt2-medium", "gpt2-large" or "gpt2-xl"; or, to train on a CPU, "char", for characters, or
                "baby", with about 7 million parameters for GPT-2's tokens.
            changes: Fields to override.

        Raises:
            ConfigError: There is no preset called `name`, or a changed field is not valid.
        """
        if name not in _PRESETS:
            raise ConfigError(f"There is no preset {name!r}. Choose one of: {', '.join(_PRESETS)}.")
        return replace(cls(**_PRESETS[name]), **changes)

    def end_of_text_id(self, tokenizer: "Tokenizer | None") -> int | None:
        """Return the id that ends a text: the model's own, or that of the tokenizer it was trained with."""
        if self.eos_token_id is None:
            return None if tokenizer is None else tokenizer.end_of_text_id
        return None if self.eos_token_id == NO_EOS else self.eos_token_id

    @property
    def padded_vocab_size(self) -> int:
        """Number of rows of the embedding and the head in memory. Rows from `vocab_size` on are padding."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def check_dropout(dropout: object) -> None:
    """Check that a value is a valid dropout probability: at least 0 and less than 1."""
    if isinstance(dropout, bool) or not (isinstance(dropout, int | float) and 0.0 <= dropout < 1.0):
        raise ConfigError(f"dropout={dropout!r} is not valid. Use a float of at least 0 and less than 1.")
