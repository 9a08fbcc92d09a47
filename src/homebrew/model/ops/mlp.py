"""The MLP's arithmetic, fused for a GPU.

Between its two matrix products GPT-2's MLP holds its widest activations, 4·C for each token. For the backward
pass only the values before the GELU are kept; one kernel then makes the GELU's values anew, the gradient
before it, and the first bias's gradient.
"""

import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from homebrew.model.ops.autocast import compute_dtype

_HAS_TRITON = importlib.util.find_spec("triton") is not None


def mlp(x: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor) -> Tensor:
    """Linear, tanh GELU, linear.

    Args:
        x: (B, T, C), any float dtype; under autocast the matrix products run in its dtype.
        w_in: (F, C).
        b_in: (F,).
        w_out: (C, F).
        b_out: (C,).

    Returns:
        (B, T, C).
    """
    if not (x.is_cuda and _HAS_TRITON):
        return F.linear(F.gelu(F.linear(x, w_in, b_in), approximate="tanh"), w_out, b_out)
    x_rows = x.to(compute_dtype(x)).flatten(0, -2)
    y: Tensor = _FusedMLP.apply(x_rows, w_in, b_in, w_out, b_out)  # type: ignore[no-untyped-call]
    return y.view(x.shape)


class _FusedMLP(torch.autograd.Function):
    """`mlp` over rows, (n, C) -> (n, C)."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - autograd's own
        x: Tensor,
        w_in: Tensor,
        b_in: Tensor,
        w_out: Tensor,
        b_out: Tensor,
    ) -> Tensor:
        before = F.linear(x, w_in.to(x.dtype), b_in.to(x.dtype))  # (n, F)
        ctx.save_for_backward(x if w_in.requires_grad else None, before, w_in, w_out)
        return F.linear(_gelu(before), w_out.to(x.dtype), b_out.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - autograd's own
        x, before, w_in, w_out = ctx.saved_tensors
        wants_x, wants_w_in, wants_b_in, wants_w_out, wants_b_out = ctx.needs_input_grad
        after, d_before, d_b_in = _gelu_backward(before, d_y @ w_out.to(d_y.dtype))
        return (  # under LoRA the weights are frozen, and in the first block so is all below
            d_before @ w_in.to(d_y.dtype) if wants_x else None,
            (d_before.T @ x).to(w_in.dtype) if wants_w_in else None,
            d_b_in.to(w_in.dtype) if wants_b_in else None,
            (d_y.T @ after).to(w_out.dtype) if wants_w_out else None,
            d_y.sum(0, dtype=torch.float32).to(w_out.dtype) if wants_b_out else None,
        )


@torch.library.custom_op("homebrew::gelu", mutates_args=())
def _gelu(x: Tensor) -> Tensor:
    from homebrew.model.ops.triton_kernels import gelu

    return gelu(x)


@_gelu.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("homebrew::gelu_backward", mutates_args=())
def _gelu_backward(x: Tensor, d_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from homebrew.model.ops.triton_kernels import gelu_backward

    return gelu_backward(x, d_y.contiguous())


@_gelu_backward.register_fake
def _(x: Tensor, _d_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x), x.new_empty(x.shape[1], dtype=torch.float32)
