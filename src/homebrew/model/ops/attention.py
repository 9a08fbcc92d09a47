"""Causal attention with the fastest implementation for the device."""

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from homebrew.model.ops.cudnn_attention import cudnn_attention, uses_cudnn

TRAINING_ATTENTION = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""Backends for training, in order of preference. PyTorch uses the first that supports the inputs."""

MAX_UNFUSED_CPU_LENGTH = 256
"""Up to this sequence length, PyTorch's fused bfloat16 kernel on a CPU is slower than separate operations."""


def self_attention(qkv: Tensor, *, dropout: float, training: bool) -> Tensor:
    """Compute causal attention.

    Args:
        qkv: Queries, keys and values, (B, T, 3, nh, hs).
        dropout: Probability of a weight to be dropped. Only used in training.
        training: Whether the model is in training mode.

    Returns:
        Tensor of shape (B, T, nh, hs).
    """
    # Only its backward pass is faster than PyTorch's, so it is not used without gradients.
    if training and dropout == 0.0 and torch.is_grad_enabled() and uses_cudnn(qkv):
        return cudnn_attention(qkv)
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))  # (B, nh, T, hs) each
    return causal_attention(q, k, v, dropout=dropout, training=training).transpose(1, 2)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, *, dropout: float, training: bool) -> Tensor:
    """Compute scaled dot-product attention in which each position attends to itself and earlier positions.

    Queries, keys and values are (B, nh, T, hs).

    Returns:
        Tensor of shape (B, nh, T, hs), in the dtype of `v`.
    """
    dropout = dropout if training else 0.0
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] <= MAX_UNFUSED_CPU_LENGTH:
        return _unfused_attention(q, k, v, dropout)
    # cuDNN's kernels are the fastest, but each new shape costs planning time. Only training has a fixed shape.
    with sdpa_kernel(TRAINING_ATTENTION, set_priority=True) if training else nullcontext():
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)


def _unfused_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """Attention as matrix products and a float32 softmax."""
    T = q.shape[2]
    scores = q @ k.mT * k.shape[-1] ** -0.5  # (B, nh, T, T)
    later = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)  # (T, T)
    weights = scores.masked_fill(later, -torch.inf).softmax(-1, dtype=torch.float32).to(v.dtype)
    return F.dropout(weights, dropout) @ v  # (B, nh, T, hs)
