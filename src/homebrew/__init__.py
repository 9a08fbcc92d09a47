"""Train GPTs on Hugging Face Accelerate."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from homebrew.callbacks.base import Callback
    from homebrew.callbacks.curve_plot import CurvePlot
    from homebrew.callbacks.early_stopping import EarlyStopping
    from homebrew.callbacks.progress import ProgressDisplay
    from homebrew.callbacks.run_logger import RunLogger
    from homebrew.callbacks.sample_text import SampleText
    from homebrew.data.corpora import load_corpus
    from homebrew.data.dataset import TokenDataset
    from homebrew.data.dict_dataset import DictDataset
    from homebrew.data.tokenizer import Tokenizer, get_tokenizer
    from homebrew.data.train_tokenizer import train_tokenizer
    from homebrew.errors import (
        ArgumentError,
        CheckpointError,
        ConfigError,
        CorruptCheckpoint,
        DataError,
        HomebrewError,
        LaunchError,
        ModelError,
        NonFiniteError,
        ResumeMismatch,
        TokenizerError,
        TrainingError,
    )
    from homebrew.evaluation.hellaswag import HellaSwagScore, load_hellaswag, score_hellaswag
    from homebrew.evaluation.perplexity import TextScore, score_text
    from homebrew.generation.sampling import Sampling
    from homebrew.generation.streaming import generate_text
    from homebrew.hub.load import load_model
    from homebrew.hub.nanogpt import load_nanogpt
    from homebrew.hub.peft import load_adapter, save_adapter
    from homebrew.metrics.step_metrics import EvalMetrics, SkippedStep, StepMetrics, TextSample
    from homebrew.model.gpt import GPT
    from homebrew.model.gpt_config import GPTConfig
    from homebrew.model.language_model import LanguageModel
    from homebrew.model.lora import LoRAConfig, add_lora, merge_lora, unmerge_lora
    from homebrew.optim.muon import Muon
    from homebrew.training.schedule import warmup_cosine, warmup_stable_decay
    from homebrew.training.trainer import Trainer
    from homebrew.training.trainer_config import TrainerConfig

__version__ = "0.2.0"

_MODULES = {
    "callbacks.base": ("Callback",),
    "callbacks.curve_plot": ("CurvePlot",),
    "callbacks.early_stopping": ("EarlyStopping",),
    "callbacks.progress": ("ProgressDisplay",),
    "callbacks.run_logger": ("RunLogger",),
    "callbacks.sample_text": ("SampleText",),
    "data.corpora": ("load_corpus",),
    "data.dataset": ("TokenDataset",),
    "data.dict_dataset": ("DictDataset",),
    "data.tokenizer": ("Tokenizer", "get_tokenizer"),
    "data.train_tokenizer": ("train_tokenizer",),
    "errors": (
        "ArgumentError",
        "CheckpointError",
        "ConfigError",
        "CorruptCheckpoint",
        "DataError",
        "HomebrewError",
        "LaunchError",
        "ModelError",
        "NonFiniteError",
        "ResumeMismatch",
        "TokenizerError",
        "TrainingError",
    ),
    "evaluation.hellaswag": ("HellaSwagScore", "load_hellaswag", "score_hellaswag"),
    "evaluation.perplexity": ("TextScore", "score_text"),
    "generation.sampling": ("Sampling",),
    "generation.streaming": ("generate_text",),
    "hub.load": ("load_model",),
    "hub.nanogpt": ("load_nanogpt",),
    "hub.peft": ("load_adapter", "save_adapter"),
    "metrics.step_metrics": ("EvalMetrics", "SkippedStep", "StepMetrics", "TextSample"),
    "model.gpt": ("GPT",),
    "model.gpt_config": ("GPTConfig",),
    "model.language_model": ("LanguageModel",),
    "model.lora": ("LoRAConfig", "add_lora", "merge_lora", "unmerge_lora"),
    "optim.muon": ("Muon",),
    "training.schedule": ("warmup_cosine", "warmup_stable_decay"),
    "training.trainer": ("Trainer",),
    "training.trainer_config": ("TrainerConfig",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}
"""Names are imported on first use: PyTorch takes seconds, and `homebrew --help` does not need it."""

__all__ = [
    "GPT",
    "ArgumentError",
    "Callback",
    "CheckpointError",
    "ConfigError",
    "CorruptCheckpoint",
    "CurvePlot",
    "DataError",
    "DictDataset",
    "EarlyStopping",
    "EvalMetrics",
    "GPTConfig",
    "HellaSwagScore",
    "HomebrewError",
    "LanguageModel",
    "LaunchError",
    "LoRAConfig",
    "ModelError",
    "Muon",
    "NonFiniteError",
    "ProgressDisplay",
    "ResumeMismatch",
    "RunLogger",
    "SampleText",
    "Sampling",
    "SkippedStep",
    "StepMetrics",
    "TextSample",
    "TextScore",
    "TokenDataset",
    "Tokenizer",
    "TokenizerError",
    "Trainer",
    "TrainerConfig",
    "TrainingError",
    "add_lora",
    "generate_text",
    "get_tokenizer",
    "load_adapter",
    "load_corpus",
    "load_hellaswag",
    "load_model",
    "load_nanogpt",
    "merge_lora",
    "save_adapter",
    "score_hellaswag",
    "score_text",
    "train_tokenizer",
    "unmerge_lora",
    "warmup_cosine",
    "warmup_stable_decay",
]


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'homebrew' has no attribute {name!r}")
    return getattr(importlib.import_module(f"homebrew.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_MODULE_OF]
