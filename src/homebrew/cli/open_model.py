"""Load a model for the commands that run one: `sample` and `eval`, and its tokenizer also for `train`."""

from typing import TYPE_CHECKING, Literal

from homebrew.errors import ConfigError

if TYPE_CHECKING:
    from homebrew.data.tokenizer import Tokenizer
    from homebrew.model.gpt import GPT

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def open_model(
    source: str, device: str, dtype: Dtype = "float32", *, base: str | None = None, tokenizer: str | None = None
) -> tuple["GPT", "Tokenizer"]:
    """Load a model in evaluation mode on a device, and its tokenizer.

    Args:
        source: Folder of a run, checkpoint, exported model or PEFT adapter, or hub repository.
        device: PyTorch device, such as "cpu", "cuda" or "cuda:1". "auto" selects the accelerator if there is one.
        dtype: Data type of the weights. "auto" selects bfloat16 on a GPU with native bfloat16, otherwise float32.
        base: Base model of an adapter. Default: the base recorded with the adapter.
        tokenizer: Name of the tokenizer, for a model that does not record it.

    Raises:
        ConfigError: The device cannot be used, or the tokenizer is unknown or a different one.
    """
    import torch

    from homebrew.hub.load import load_model

    if device == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        device = "cpu" if accelerator is None else str(accelerator)
    if dtype == "auto":
        has_bf16 = device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if has_bf16 else "float32"
    model, saved_tokenizer = load_model(source, base=base)
    resolved_tokenizer = resolve_tokenizer(source, saved_tokenizer, tokenizer)
    try:
        model = model.to(device, getattr(torch, dtype))
        if model.device.type == "cuda":
            torch.cuda.set_device(model.device)  # kernels launch on the current device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(
            f"device={device!r} cannot be used: {reason} Run `homebrew doctor` to see the available devices."
        ) from error
    return model, resolved_tokenizer


def resolve_tokenizer(source: str, saved: "Tokenizer | None", requested: str | None) -> "Tokenizer":
    """Return the tokenizer saved with a model, or the requested one if none was saved.

    Args:
        source: Location of the model, for error messages.
        saved: Tokenizer saved with the model, or None if unknown.
        requested: Name of the tokenizer requested on the command line, if any.

    Raises:
        ConfigError: There is neither a saved nor a requested tokenizer, or they differ.
    """
    from homebrew.data.tokenizer import get_tokenizer

    if saved is None:
        if requested is None:
            raise ConfigError(
                f"The tokenizer of {source} is unknown or not supported. If the model was trained with GPT-2's or the "
                f"byte tokenizer, pass --tokenizer gpt2 or --tokenizer bytes."
            )
        return get_tokenizer(requested)
    if requested not in (None, saved.name):
        raise ConfigError(
            f"{source} has the tokenizer {saved.name!r}, not {requested!r}. Remove --tokenizer {requested}."
        )
    return saved
