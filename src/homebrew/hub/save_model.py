"""Saves any model to a folder, in the format for its kind of model."""

from pathlib import Path
from typing import Any

from safetensors.torch import save_model as save_safetensors

from homebrew.data.tokenizer import Tokenizer, is_built_in
from homebrew.errors import ModelError
from homebrew.hub.from_pretrained import WEIGHTS_FILE
from homebrew.hub.model_folder import output_folder
from homebrew.hub.tokenizer_files import tokenizer_files, write_tokenizer_files
from homebrew.io import atomic_replace
from homebrew.model.gpt import GPT
from homebrew.model.interfaces import interface_of
from homebrew.model.transformers_model import is_transformers_model
from homebrew.user_warnings import warn


def save_model(model: Any, folder: Path, tokenizer: Tokenizer | None) -> None:  # noqa: ANN401 - any module
    """Save a model to a folder.

    Args:
        model: A GPT; another model with a method `save_pretrained(folder)`, which is called; or any module, whose state
            dict is saved as a safetensors file. Tied weights are saved once.
        folder: Output folder.
        tokenizer: Tokenizer the model was trained with, or None. For a custom tokenizer, a warning is issued instead.

    Raises:
        ModelError: The folder cannot be written, or contains a run or a checkpoint.
    """
    if tokenizer is not None and not is_built_in(tokenizer.to_json()):
        warn(f"The custom tokenizer {tokenizer.name!r} is not saved with the model. Save it to {folder} yourself.")
        tokenizer = None
    if isinstance(model, GPT):
        model.save_pretrained(folder, tokenizer)
        return
    texts: dict[str, str] = {}
    if tokenizer is not None:
        texts = tokenizer_files(tokenizer, model_max_length=interface_of(model).block_size, is_gpt=False)
    with output_folder(folder):
        _save_weights(model, folder)
        if texts:
            write_tokenizer_files(folder, texts)
    if texts and is_transformers_model(model) and not _is_opened_by_auto_tokenizer(folder):
        warn(
            f"AutoTokenizer opens {folder} as another tokenizer, because transformers has a fixed tokenizer class for "
            f"{type(model).__name__}. Use PreTrainedTokenizerFast.from_pretrained instead."
        )


def _save_weights(model: Any, folder: Path) -> None:  # noqa: ANN401
    if not hasattr(model, "save_pretrained"):
        with atomic_replace(folder / WEIGHTS_FILE) as path:
            save_safetensors(model, str(path), metadata={"format": "pt"})
        return
    try:
        model.save_pretrained(folder)
    except Exception as error:  # raised by the model's own code
        if isinstance(error, OSError):
            raise
        raise ModelError(f"{type(model).__name__}.save_pretrained failed: {error!r}.") from error


def _is_opened_by_auto_tokenizer(folder: Path) -> bool:
    """Return whether AutoTokenizer opens a tokenizer unchanged. For Qwen2, it changes how texts are split."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        opened = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)  # otherwise it may ask on the terminal
        expected = PreTrainedTokenizerFast.from_pretrained(folder)
        return bool(opened.backend_tokenizer.to_str() == expected.backend_tokenizer.to_str())
    except Exception:  # such as a tokenizer class that needs another library
        return False
