"""`homebrew export`."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from homebrew.errors import ConfigError


@dataclass
class Export:
    """Write a model as Hugging Face's transformers opens it, with its tokenizer.

    AutoModelForCausalLM, AutoTokenizer and pipeline("text-generation") open the folder directly. An adapter is merged.
    What was written is read again and compared, weights and logits.
    """

    checkpoint: Positional[Annotated[str, arg(metavar="CHECKPOINT")]]
    """A run's folder (its newest checkpoint), a checkpoint, or an adapter in PEFT's format."""
    folder: Positional[Annotated[Path | None, arg(metavar="[FOLDER]")]] = None
    """Where to; files of the same names are replaced."""
    base: str | None = None
    """For an adapter, where its base is now, if not where it was trained on it."""
    push_to_hub: str | None = None
    """Upload to this repository, user/name; log in first with `hf auth login`."""
    private: bool = False
    """Make the repository private, if it has to be made."""
    adapter: bool = False
    """Write the adapter alone, in PEFT's format, for its base."""
    no_tokenizer: bool = False
    """Do not write its files; those of another that are there stay."""

    def run(self) -> None:
        """Do it."""
        if self.folder is None and self.push_to_hub is None:
            raise ConfigError("Say where to: a folder, --push-to-hub, or both.")
        if self.adapter and (self.folder is None or self.push_to_hub is not None):
            raise ConfigError("--adapter writes to a folder, and only there: give one, and no --push-to-hub.")
        if self.private and self.push_to_hub is None:
            raise ConfigError("--private is for a repository that --push-to-hub makes: give both, or neither.")
        if self.folder is not None and os.path.isdir(self.folder / "checkpoints"):  # noqa: PTH112 - raises nothing
            raise ConfigError(f"{self.folder} is a run's folder, which its checkpoints are read from: name another.")
        from homebrew.hub.load import load_model
        from homebrew.hub.peft import save_adapter

        model, tokenizer = load_model(self.checkpoint, base=self.base)
        chosen = None if self.no_tokenizer else tokenizer
        if self.folder is not None and self.adapter:
            save_adapter(model, self.folder, base_model=model.source)
            print(f"{self.folder} is written: an adapter of {model.source}. To try it: homebrew sample {self.folder}")
            return
        if self.folder is not None:
            model.save_pretrained(self.folder, chosen)
            print(f"{self.folder} is written, and reads as it was written. To try it:")
            tokens = max(1, min(50, model.config.block_size // 2))  # by itself it asks for more than a small model has
            print(f"  transformers.pipeline('text-generation', {str(self.folder)!r})('Once', max_new_tokens={tokens})")
        if self.push_to_hub is not None:
            print(model.push_to_hub(self.push_to_hub, chosen, private=self.private or None))
