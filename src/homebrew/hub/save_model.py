"""Saves any model to a folder, in the format that its kind has."""

from pathlib import Path
from typing import Any

from safetensors.torch import save_model as save_safetensors

from homebrew.data.tokenizer import Tokenizer
from homebrew.errors import ModelError
from homebrew.hub.from_pretrained import WEIGHTS_FILE
from homebrew.hub.model_folder import output_folder
from homebrew.io import atomic_replace
from homebrew.model.gpt import GPT


def save_model(model: Any, folder: Path, tokenizer: Tokenizer | None) -> None:  # noqa: ANN401 - any module
    """Save a model to a folder.

    Args:
        model: A GPT, which is saved with its tokenizer; another model with a method `save_pretrained(folder)`, which is
            called; or any module, whose state dict is saved as a safetensors file, tied weights once.
        folder: Output folder.
        tokenizer: Tokenizer of a GPT.

    Raises:
        ModelError: The folder cannot be written, or holds a checkpoint.
    """
    if isinstance(model, GPT):
        model.save_pretrained(folder, tokenizer)
        return
    with output_folder(folder, forbidden_files={"manifest.json": "a checkpoint"}):
        if not hasattr(model, "save_pretrained"):
            with atomic_replace(folder / WEIGHTS_FILE) as path:
                save_safetensors(model, str(path), metadata={"format": "pt"})
            return
        try:
            model.save_pretrained(folder)
        except Exception as error:  # of the model's own code
            if isinstance(error, OSError):
                raise
            raise ModelError(f"{type(model).__name__}.save_pretrained failed: {error!r}.") from error
