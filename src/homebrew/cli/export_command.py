"""`homebrew export`."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from homebrew.cli.open_model import sample_command
from homebrew.errors import ConfigError


@dataclass
class Export:
    """Export a model and its tokenizer to Hugging Face transformers.

    AutoModelForCausalLM, AutoTokenizer and pipeline("text-generation") open the folder directly. An adapter is merged
    into its base. The export is reloaded, and its weights and logits are compared with the model's.
    """

    checkpoint: Positional[Annotated[str, arg(metavar="CHECKPOINT")]]
    """Folder of a run (its newest checkpoint), of a checkpoint, or of an adapter in PEFT's format."""
    folder: Positional[Annotated[Path | None, arg(metavar="[FOLDER]", help_behavior_hint="")]] = None
    """Folder to write to. The files of an earlier export are replaced or removed."""
    base: Annotated[str | None, arg(help_behavior_hint="")] = None
    """For an adapter, its base model. The default is the location recorded with the adapter."""
    push_to_hub: Annotated[str | None, arg(help_behavior_hint="")] = None
    """Hub repository to upload to, user/name. Log in first with `hf auth login`."""
    private: bool = False
    """Make the repository private if it is created."""
    adapter: bool = False
    """Export only the adapter, in PEFT's format."""
    no_tokenizer: bool = False
    """Do not write tokenizer files. Existing ones in the folder are kept."""

    def run(self) -> None:
        """Run the command."""
        if self.folder is None and self.push_to_hub is None:
            raise ConfigError("No destination is given. Pass a folder, --push-to-hub, or both.")
        if self.adapter and (self.folder is None or self.push_to_hub is not None):
            raise ConfigError("--adapter writes only to a folder. Pass a folder, and remove --push-to-hub.")
        if self.private and self.push_to_hub is None:
            raise ConfigError("--private needs --push-to-hub. Pass both, or remove --private.")
        if self.folder is not None and os.path.isdir(self.folder / "checkpoints"):  # noqa: PTH112 - never raises
            raise ConfigError(f"{self.folder} is the folder of a run. Choose another folder for the export.")
        from homebrew.hub.load import load_model
        from homebrew.hub.peft import save_adapter
        from homebrew.model.lora import lora_layers

        model, tokenizer = load_model(self.checkpoint, base=self.base)
        if self.adapter and not lora_layers(model):
            raise ConfigError(f"{self.checkpoint} has no adapter. Remove --adapter to export the model.")
        if self.no_tokenizer:
            tokenizer = None
        if self.folder is not None and self.adapter:
            save_adapter(model, self.folder, base_model=model.source, tokenizer=tokenizer)
            print(f"Exported an adapter of {model.source} to {self.folder}. Try it:")
            print(f"  {sample_command(self.folder, tokenizer)}")
            return
        if self.folder is not None:
            model.save_pretrained(self.folder, tokenizer)
            print(f"Exported and verified {self.folder}. Try it:")
            print(f"  {sample_command(self.folder, tokenizer)}")
            if tokenizer is not None:  # transformers' pipeline needs a tokenizer
                # The pipeline's default number of tokens is more than a small model's block size.
                max_new_tokens = max(1, min(50, model.config.block_size // 2))
                print(
                    f"In Python: transformers.pipeline('text-generation', {str(self.folder)!r})"
                    f"('Once', max_new_tokens={max_new_tokens})"
                )
        if self.push_to_hub is not None:
            print(model.push_to_hub(self.push_to_hub, tokenizer, private=self.private or None))
