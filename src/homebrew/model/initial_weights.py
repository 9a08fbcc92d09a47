"""Initial weights of a GPT."""

import math
from typing import get_args

import torch
from torch import Tensor, nn

from homebrew.errors import ConfigError
from homebrew.model.gpt_config import GPTConfig, Init

_STD = 0.02
_LOCAL_QUERY_SCALE = 1.5


@torch.no_grad()
def initialize(model: nn.Module, config: GPTConfig, generator: torch.Generator, init: Init) -> None:
    """Draw the weights of a GPT: normal with std 0.02, and 0.02 / sqrt(2 * n_layer) for residual projections.

    With "local", position embeddings are sinusoids instead (Vaswani et al. 2017), as large as those of GPT-2, and each
    attention head starts out looking at one distance; see `look_back`.

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
        if init == "local" and name.endswith("wpe.weight"):
            parameter.copy_(_STD * math.sqrt(2) * sinusoids(*parameter.shape))
        if init == "local" and name.endswith("c_attn.weight"):
            look_back(parameter, config.n_head)


def look_back(weight: Tensor, n_head: int) -> None:
    """Let each head start out looking at one distance: head h at the token h positions before.

    Positions have to be sinusoids, which move by a distance if their pairs of columns are rotated. The keys of a head
    are its queries, so rotated. A query then agrees most with the key at that distance, and also with those of tokens
    like its own, as in "Mimetic initialization of self-attention layers" (Trockman and Kolter 2023).

    Args:
        weight: Weight of queries, keys and values, (3 * n_embd, n_embd). Queries become 1.5 times as large.
        n_head: Number of heads.
    """
    width = weight.shape[1]
    queries, keys = weight[: 2 * width].view(2, n_head, -1, width)
    queries *= _LOCAL_QUERY_SCALE
    angles = torch.arange(n_head)[:, None, None] * _frequencies(width)[: width // 2]  # (n_head, 1, width / 2)
    sines, cosines = angles.sin().to(weight.device), angles.cos().to(weight.device)
    even, odd = queries[..., 0 : width - 1 : 2], queries[..., 1::2]
    keys.copy_(queries)
    keys[..., 0 : width - 1 : 2] = even * cosines - odd * sines
    keys[..., 1::2] = even * sines + odd * cosines


def sinusoids(length: int, width: int) -> Tensor:
    """Return sines, in even columns, and cosines of positions, (length, width). Wavelengths are 2π to 20,000π."""
    angles = torch.arange(length)[:, None] * _frequencies(width)  # (length, width / 2), rounded up
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :width]


def _frequencies(width: int) -> Tensor:
    """Return the angle between neighboring positions for each pair of columns, (width / 2,), rounded up."""
    return 10_000.0 ** -(torch.arange(0, width, 2) / width)
