"""Converter for the checkpoints of nanoGPT's train.py."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from homebrew.errors import ConfigError, ModelError
from homebrew.hub.from_pretrained import CAUSAL_MASK, WRAPPERS
from homebrew.model.gpt import GPT
from homebrew.model.gpt_config import EMBEDDING, LM_HEAD, GPTConfig


def load_nanogpt(checkpoint: Mapping[str, Any]) -> GPT:
    """Convert a checkpoint of nanoGPT's train.py to a GPT, in evaluation mode.

    nanoGPT computes the exact GELU, homebrew the tanh approximation that GPT-2 was trained with. The logits therefore
    differ by some thousandths, and a model that is trained further adapts. Biases that nanoGPT's `bias=False` leaves
    out are zero.

    Args:
        checkpoint: Result of `torch.load("out/ckpt.pt", map_location="cpu", weights_only=True)`: the weights are under
            "model", with or without the prefixes of torch.compile and DDP, and the model's sizes under "model_args".

    Raises:
        ModelError: The checkpoint is not nanoGPT's, or its weights do not fit its sizes.
    """
    state, config = _contents(checkpoint)
    with torch.device("meta"):
        model = GPT(config)
    if not checkpoint["model_args"].get("bias", True):
        for name, tensor in model.state_dict().items():
            if name.endswith(".bias"):
                state.setdefault(name, torch.zeros(tensor.shape))
    num_padding = config.padded_vocab_size - config.vocab_size
    embedding, head = state.get(EMBEDDING), state.get(LM_HEAD)
    if embedding is None or head is None or not torch.equal(embedding, head):
        raise ModelError(f"{LM_HEAD} and {EMBEDDING} are missing or differ. Only tied heads are supported.")
    if embedding.shape != (config.vocab_size, config.n_embd):
        raise ModelError(f"{EMBEDDING} has the shape {tuple(embedding.shape)}, which does not fit model_args.")
    state[LM_HEAD] = state[EMBEDDING] = F.pad(embedding, (0, 0, 0, num_padding))
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ModelError(
            f"The checkpoint's weights do not fit its model_args. Pass what torch.load returns for nanoGPT's ckpt.pt, "
            f"unchanged. {error}"
        ) from error
    model.lm_head.weight = model.transformer.wte.weight
    return model.eval()


def _contents(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Tensor], GPTConfig]:
    """Return float32 weights on the CPU with `GPT`'s names, and the configuration."""
    weights = checkpoint.get("model") if isinstance(checkpoint, Mapping) else None
    arguments = checkpoint.get("model_args") if isinstance(checkpoint, Mapping) else None
    if not isinstance(weights, Mapping) or not isinstance(arguments, Mapping):
        raise ModelError(
            "The checkpoint has no 'model' and 'model_args' that are dictionaries. Pass what torch.load(path, "
            "map_location='cpu', weights_only=True) returns for nanoGPT's ckpt.pt."
        )
    names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout")
    if lacking := [name for name in names[:-1] if name not in arguments]:
        raise ModelError(f"The checkpoint's model_args have no {', '.join(lacking)}. Is it a checkpoint of nanoGPT?")
    try:
        config = GPTConfig(**{name: arguments[name] for name in names if name in arguments})
    except ConfigError as error:
        raise ModelError(f"The checkpoint's model_args do not describe a GPT: {error}") from error
    state = {}
    for key, tensor in weights.items():
        if CAUSAL_MASK.search(key):
            continue
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or not tensor.isfinite().all():
            raise ModelError(f"The checkpoint's {key} is not a tensor of finite floating-point numbers.")
        state[WRAPPERS.sub("", key)] = tensor.detach().to("cpu", torch.float32, copy=True)
    return state, config
