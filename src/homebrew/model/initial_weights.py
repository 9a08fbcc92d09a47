"""Initial weights of a GPT."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from homebrew.errors import ConfigError
from homebrew.model.gpt_config import GPTConfig, Init

_STD = 0.02
_LOCAL_QUERY_SCALE = 1.5
_INITIALIZERS = ("kaiming_uniform_", "normal_", "uniform_")
"""Functions that PyTorch's layers use to draw weights."""


class UninitializedWeights(TorchFunctionMode):
    """Builds linear layers and embeddings without drawing weights, for a model that draws its own weights.

    Drawing PyTorch's default weights as well would double the time, use the global random state, and, on the meta
    device, import sympy.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - what the function returns
        """Call a PyTorch function, unless it draws weights."""
        return None if func.__name__ in _INITIALIZERS else func(*args, **kwargs or {})


@torch.no_grad()
def initialize(model: nn.Module, config: GPTConfig, generator: torch.Generator, init: Init) -> None:
    """Draw the weights of a GPT: normal with std 0.02, and 0.02 / sqrt(2 * n_layer) for residual projections.

    With "local", position embeddings are sinusoids instead (Vaswani et al. 2017), as large as those of GPT-2, and each
    attention head initially looks at one distance; see `look_back`.

    Raises:
        ConfigError: `init` is not valid.
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
    """Initialize each head to look at one distance: head h attends to the tokens about h positions before.

    Position embeddings have to be sinusoids: a rotation of their pairs of columns moves them by a distance. The key
    weights of a head are set to its query weights, rotated by the head's distance. A query therefore matches the
    position embedding at that distance best. Token embeddings match those of the same token, as in "Mimetic
    initialization of self-attention layers" (Trockman and Kolter 2023): a token attends most to itself, then to the
    token at the head's distance.

    Args:
        weight: Weight of queries, keys and values, (3 * n_embd, n_embd), changed in place. The query weights become 1.5
            times as large.
        n_head: Number of heads.
    """
    width = weight.shape[1]
    paired = width - width % 2  # the last column of an odd width has no partner to rotate with
    queries, keys = weight[: 2 * width].view(2, n_head, -1, width)
    queries *= _LOCAL_QUERY_SCALE
    keys.copy_(queries)
    rotation = sinusoids(n_head, width)[:, None, :paired]  # each head's distance, (n_head, 1, paired)
    sines, cosines = rotation[..., ::2], rotation[..., 1::2]
    even, odd = queries[..., :paired:2], queries[..., 1::2]
    keys[..., :paired:2] = even * cosines - odd * sines
    keys[..., 1::2] = even * sines + odd * cosines


def sinusoids(length: int, width: int) -> Tensor:
    """Return sines (even columns) and cosines (odd columns) of positions, (length, width).

    Wavelengths are 2π to 20,000π.
    """
    columns = torch.arange(0, width, 2, dtype=torch.float32)  # a half-precision default dtype cannot count positions
    angles = torch.arange(length)[:, None] * 10_000.0 ** -(columns / width)  # (length, width / 2), rounded up
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :width]
