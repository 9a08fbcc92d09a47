"""What several commands do: open a model and put it where it runs."""

from typing import TYPE_CHECKING, Literal

from homebrew.errors import ConfigError

if TYPE_CHECKING:
    from homebrew.data.tokenizer import Tokenizer
    from homebrew.model.gpt import GPT

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def open_model(
    source: str, device: str, dtype: Dtype = "float32", *, base: str | None = None
) -> tuple["GPT", "Tokenizer"]:
    """A model, in evaluation mode on a device, and its tokenizer.

    Args:
        source: a run's folder, a checkpoint, or a folder or hub repository in transformers' format.
        device: "cpu", "cuda", "cuda:1", "mps"; "auto" is the first accelerator there is.
        dtype: of the weights; "auto" is bfloat16 on a GPU that has it, else float32.
        base: the weights below an adapter, if not where its run had them from.

    Raises:
        ConfigError: there is no such device, or the model's tokenizer is not known.
    """
    import torch

    from homebrew.training.saved import load_run_model

    if device == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        device = "cpu" if accelerator is None else str(accelerator)
    model, tokenizer = load_run_model(source, base=base)
    if tokenizer is None:
        raise ConfigError(
            f"{source} does not say which tokenizer it was trained with. Give a checkpoint of a run on text, or a "
            f"model with GPT-2's vocabulary."
        )
    if dtype == "auto":
        has_bfloat16 = device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if has_bfloat16 else "float32"
    try:
        model = model.to(device, getattr(torch, dtype))
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(f"device={device!r} cannot be used: {reason} See `homebrew doctor`.") from error
    return model, tokenizer
