"""Options and loading of a saved model, for `sample` and `eval`; choice of its tokenizer, also for `train`."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from homebrew.errors import ConfigError

if TYPE_CHECKING:
    from homebrew.data.tokenizer import Tokenizer
    from homebrew.model.gpt import GPT

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(kw_only=True)
class SavedModel:
    """The options of a command that runs a saved model."""

    checkpoint: Positional[Annotated[str, arg(metavar="MODEL")]]
    """Folder of a model, or hub repository.
    The folder may be a run, whose newest checkpoint is used, a checkpoint, an export or a PEFT adapter."""
    base: Annotated[str | None, arg(help_behavior_hint="")] = None
    """Base model of an adapter, if it has moved since training."""
    device: str = "auto"
    """PyTorch device: cpu, cuda, cuda:1, mps. "auto" selects the GPU if there is one."""
    dtype: Dtype = "auto"
    """Data type of the weights. "auto" selects bfloat16 on a GPU with native bfloat16, otherwise float32."""
    tokenizer: Literal["auto", "gpt2", "bytes"] | Path = "auto"
    """Tokenizer of a model that does not record it: a name, or the path of a tokenizer that `homebrew tokenizer train`
    has written. "auto" uses the recorded tokenizer."""

    def open_model(self) -> tuple["GPT", "Tokenizer"]:
        """Load the model, in evaluation mode and on the device, and its tokenizer.

        Raises:
            ConfigError: The device cannot be used, or the tokenizer is unknown or differs from the recorded one.
        """
        import torch

        from homebrew.checkpoint.tensor_check import find_non_finite
        from homebrew.hub.load import load_model

        device, dtype = self.device, self.dtype
        if device == "auto":
            accelerator = torch.accelerator.current_accelerator(check_available=True)
            device = "cpu" if accelerator is None else str(accelerator)
        if dtype == "auto":
            has_bf16 = device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
            dtype = "bfloat16" if has_bf16 else "float32"
        model, saved_tokenizer = load_model(self.checkpoint, base=self.base)
        tokenizer = resolve_tokenizer(self.checkpoint, saved_tokenizer, self.tokenizer)
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ConfigError(
                f"The tokenizer {tokenizer.name!r} has {tokenizer.vocab_size:,} ids, but {self.checkpoint} has "
                f"{model.config.vocab_size:,}. Use the tokenizer the model was trained with."
            )
        try:
            torch.zeros(1, device=device).item()  # fails on a device without data, such as meta
            model = model.to(device, getattr(torch, dtype))
            if model.device.type == "cuda":
                torch.cuda.set_device(model.device)  # kernels launch on the current device
        except (RuntimeError, AssertionError, ImportError) as error:
            reason = str(error).strip().split("\n")[0].removesuffix(".")
            raise ConfigError(
                f"device={device!r} cannot be used: {reason}. Run `homebrew doctor` to see the available devices."
            ) from error
        if bad := find_non_finite("model", model.state_dict()):
            raise ConfigError(f"{bad} has values that are too large for dtype={dtype!r}. Use --dtype float32.")
        return model, tokenizer


def sample_command(folder: Path, tokenizer: "Tokenizer | None") -> str:
    """Return the command that samples from a model, for messages."""
    from homebrew.hub.tokenizer_files import HOMEBREW_FILE

    is_recorded = tokenizer is not None or (folder / HOMEBREW_FILE).exists()  # an earlier export's file is kept
    option = "" if is_recorded else " --tokenizer gpt2  (or the one that the model was trained with)"
    return f"homebrew sample {shlex.quote(str(folder))}{option}"


def resolve_tokenizer(source: str, saved: "Tokenizer | None", requested: str | Path) -> "Tokenizer":
    """Return the tokenizer saved with a model, or the requested one if none was saved. "auto" requests none.

    Raises:
        ConfigError: There is neither a saved nor a requested tokenizer, or they differ.
    """
    from homebrew.data.tokenizer import get_tokenizer

    if saved is None:
        if requested == "auto":
            raise ConfigError(
                f"The tokenizer of {source} is unknown or not supported. If the model was trained with GPT-2's or the "
                f"byte tokenizer, pass --tokenizer gpt2 or --tokenizer bytes. If it was trained with another one, pass "
                f"the path of that tokenizer's tokenizer.json."
            )
        return get_tokenizer(requested)
    if requested != "auto" and not is_requested(saved, requested):
        raise ConfigError(
            f"{source} has the tokenizer {saved.name!r}, not {str(requested)!r}. Remove --tokenizer {requested}."
        )
    return saved


def is_requested(tokenizer: "Tokenizer | None", requested: str | Path) -> bool:
    """Return whether a tokenizer has the requested name, or is the one in the requested file."""
    from homebrew.data.tokenizer import get_tokenizer

    if tokenizer is None or str(requested) == tokenizer.name:
        return tokenizer is not None
    return isinstance(requested, Path) and tokenizer.to_json() == get_tokenizer(requested).to_json()
