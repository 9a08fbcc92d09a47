"""Causal attention in training, by whichever way is fastest where it runs."""

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

TRAINING_ATTENTION = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]

SHORT_ON_CPU = 256
"""Up to this many tokens PyTorch's one kernel for bfloat16 on a CPU is slower than the operations it replaces."""


def causal_attention(q: Tensor, k: Tensor, v: Tensor, *, dropout: float, training: bool) -> Tensor:
    """Every position's mean of the values up to it, weighted by the softmax of its scores.

    Args:
        q: queries, (B, nh, T, hs).
        k: keys, of the same shape.
        v: values, of the same shape.
        dropout: probability, in training, of dropping a weight.
        training: whether a backward pass will follow.

    Returns:
        (B, nh, T, hs), in the dtype of `v`.
    """
    dropout = dropout if training else 0.0
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] <= SHORT_ON_CPU:
        return _written_out(q, k, v, dropout)
    # cuDNN's kernels are the fastest, but it plans each new shape anew; only training keeps to one.
    with sdpa_kernel(TRAINING_ATTENTION, set_priority=True) if training else nullcontext():
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)


def _written_out(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """The same in matrix products and a float32 softmax."""
    T = q.shape[2]
    scores = q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5  # (B, nh, T, T)
    later = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    weights = scores.masked_fill(later, float("-inf")).softmax(-1, dtype=torch.float32).to(v.dtype)
    return F.dropout(weights, dropout) @ v
