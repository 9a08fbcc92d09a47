"""Train GPTs on Hugging Face Accelerate."""

from homebrew.data.corpora import load_corpus
from homebrew.data.dataset import TokenDataset
from homebrew.data.tokenizer import get_tokenizer
from homebrew.errors import HomebrewError
from homebrew.model.config import GPTConfig
from homebrew.model.gpt import GPT
from homebrew.training.callbacks import Callback, EarlyStopping
from homebrew.training.config import TrainerConfig
from homebrew.training.schedule import warmup_cosine
from homebrew.training.trainer import Trainer

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
