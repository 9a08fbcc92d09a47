"""Train GPTs on Hugging Face Accelerate."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from homebrew.callbacks.base import Callback, EarlyStopping
    from homebrew.data.corpora import load_corpus
    from homebrew.data.dataset import TokenDataset
    from homebrew.data.tokenizer import get_tokenizer
    from homebrew.errors import HomebrewError
    from homebrew.model.gpt import GPT
    from homebrew.model.gpt_config import GPTConfig
    from homebrew.training.schedule import warmup_cosine
    from homebrew.training.trainer import Trainer
    from homebrew.training.trainer_config import TrainerConfig

__version__ = "0.1.0"
__all__ = [
    "GPT",
    "Callback",
    "EarlyStopping",
    "GPTConfig",
    "HomebrewError",
    "TokenDataset",
    "Trainer",
    "TrainerConfig",
    "get_tokenizer",
    "load_corpus",
    "warmup_cosine",
]

# Imported when first asked for: PyTorch takes seconds, and the command line's --help needs none of it.
_HOMES = {
    "GPT": "model.gpt",
    "GPTConfig": "model.gpt_config",
    "Callback": "callbacks.base",
    "EarlyStopping": "callbacks.base",
    "HomebrewError": "errors",
    "TokenDataset": "data.dataset",
    "Trainer": "training.trainer",
    "TrainerConfig": "training.trainer_config",
    "get_tokenizer": "data.tokenizer",
    "load_corpus": "data.corpora",
    "warmup_cosine": "training.schedule",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'homebrew' has no attribute {name!r}")
    return getattr(importlib.import_module(f"homebrew.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
