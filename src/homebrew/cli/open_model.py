"""What several commands do: open a model and put it where it runs."""

from typing import TYPE_CHECKING, Literal

from homebrew.errors import ConfigError

if TYPE_CHECKING:
    from homebrew.data.tokenizer import Tokenizer
    from homebrew.model.gpt import GPT

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def open_model(
    source: str, device: str, dtype: Dtype = "float32", *, base: str | None = None, tokenizer: str | None = None
) -> tuple["GPT", "Tokenizer"]:
    """A model, in evaluation mode on a device, and its tokenizer.

    Args:
        source: a run's folder, a checkpoint, or a folder or hub repository in transformers' format.
        device: "cpu", "cuda", "cuda:1", "mps"; "auto" is the first accelerator there is.
        dtype: of the weights; "auto" is bfloat16 on a GPU that has it, else float32.
        base: the weights below an adapter, if not where its run had them from.
        tokenizer: its name, for a model that does not say.

    Raises:
        ConfigError: there is no such device, or the model's tokenizer is not known or another.
    """
    import torch

    from homebrew.hub.load import load_model

    if device == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        device = "cpu" if accelerator is None else str(accelerator)
    model, known = load_model(source, base=base)
    chosen = choose_tokenizer(source, known, tokenizer)
    if dtype == "auto":
        has_bfloat16 = device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if has_bfloat16 else "float32"
    try:
        model = model.to(device, getattr(torch, dtype))
        if model.device.type == "cuda":
            torch.cuda.set_device(model.device)  # what comes after need not mind which it is
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(f"device={device!r} cannot be used: {reason} See `homebrew doctor`.") from error
    return model, chosen


def choose_tokenizer(source: str, known: "Tokenizer | None", wanted: str | None) -> "Tokenizer":
    """A model's tokenizer: the one it is known to have, else the one that is asked for.

    Args:
        source: of the model, for messages.
        known: what its files say.
        wanted: "gpt2" or "bytes".

    Raises:
        ConfigError: neither is there, or they contradict each other.
    """
    from homebrew.data.tokenizer import get_tokenizer

    if known is None:
        if wanted is None:
            raise ConfigError(
                f"{source} does not say which tokenizer it was trained with, or has one that is not ours: if it is "
                f"one of them, give --tokenizer gpt2 or --tokenizer bytes."
            )
        return get_tokenizer(wanted)
    if wanted not in (None, known.name):
        raise ConfigError(f"{source} has the tokenizer {known.name!r}, not {wanted!r}.")
    return known
