"""Initial weights of a GPT."""

import math
from typing import get_args

import torch
from torch import Tensor, nn

from homebrew.errors import ConfigError
from homebrew.model.gpt_config import GPTConfig, Init

_STD = 0.02
_SINUSOIDAL_QUERY_KEY_SCALE = 2.0


@torch.no_grad()
def initialize(model: nn.Module, config: GPTConfig, generator: torch.Generator, init: Init) -> None:
    """Draw the weights of a GPT: normal with std 0.02, and 0.02 / sqrt(2 * n_layer) for residual projections.

    With "sinusoidal", position embeddings are sinusoids instead (Vaswani et al. 2017), as large as those of GPT-2, so
    that a distance is the same rotation at every position; and the weights of queries and keys are twice as large.

    Raises:
        ConfigError: There is no such `init`.
    """
    if init not in get_args(Init):
        raise ConfigError(f"init={init!r:.100} is not valid. Use one of: {', '.join(get_args(Init))}.")
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            continue  # it has no values, and drawing them makes PyTorch import sympy, which takes a second
        if name.endswith("bias"):
            parameter.zero_()
        elif parameter.dim() == 2:
            is_residual = name.endswith("c_proj.weight")
            parameter.normal_(0.0, _STD / math.sqrt(2 * config.n_layer) if is_residual else _STD, generator=generator)
        if name.endswith("wte.weight"):
            parameter[config.vocab_size :] = 0.0  # padding
        if init == "sinusoidal" and name.endswith("wpe.weight"):
            parameter.copy_(_STD * math.sqrt(2) * sinusoids(*parameter.shape))
        if init == "sinusoidal" and name.endswith("c_attn.weight"):
            parameter[: 2 * config.n_embd] *= _SINUSOIDAL_QUERY_KEY_SCALE


def sinusoids(length: int, width: int) -> Tensor:
    """Return sines, in even columns, and cosines of positions, (length, width). Wavelengths are 2π to 20,000π."""
    positions = torch.arange(length)[:, None]
    frequencies = 10_000.0 ** -(torch.arange(0, width, 2) / width)
    angles = positions * frequencies  # (length, width / 2), rounded up
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :width]
