"""Train GPTs on Hugging Face Accelerate."""

from homebrew.errors import HomebrewError
from homebrew.model.gpt import GPT, GPTConfig

__version__ = "0.1.0"
__all__ = ["GPT", "GPTConfig", "HomebrewError"]
