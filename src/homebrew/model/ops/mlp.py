"""The MLP, fused on a GPU.

The hidden layer of GPT-2's MLP holds its widest activations, 4·C values per token. Only the GELU's input is saved
for the backward pass. There, one kernel recomputes the GELU and computes its gradient and the gradient of the first
bias.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from homebrew.model.ops import uses_triton
from homebrew.model.ops.autocast import compute_dtype


def mlp(x: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor) -> Tensor:
    """Compute linear, tanh GELU, linear.

    Args:
        x: Input, (B, T, C), any float dtype. Under autocast, matrix products run in autocast's dtype.
        w_in: Weight of the first layer, (F, C).
        b_in: Bias of the first layer, (F,).
        w_out: Weight of the second layer, (C, F).
        b_out: Bias of the second layer, (C,).

    Returns:
        Tensor of shape (B, T, C).
    """
    if not uses_triton(x):
        return F.linear(F.gelu(F.linear(x, w_in, b_in), approximate="tanh"), w_out, b_out)
    x_rows = x.to(compute_dtype(x)).flatten(0, -2)  # (B·T, C)
    y: Tensor = FusedMLP.apply(x_rows, w_in, b_in, w_out, b_out)  # type: ignore[no-untyped-call]
    return y.view(x.shape)


class FusedMLP(torch.autograd.Function):
    """`mlp` for rows, (n, C) to (n, C), with Triton kernels."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - autograd's context
        x: Tensor,
        w_in: Tensor,
        b_in: Tensor,
        w_out: Tensor,
        b_out: Tensor,
    ) -> Tensor:
        """Compute the output, and save the GELU's input."""
        pre_gelu = F.linear(x, w_in.to(x.dtype), b_in.to(x.dtype))  # (n, F)
        ctx.save_for_backward(x if w_in.requires_grad else None, pre_gelu, w_in, w_out)
        return F.linear(_gelu(pre_gelu), w_out.to(x.dtype), b_out.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - autograd's context
        """Compute the gradients of the inputs that need one. Autograd casts each to its input's dtype."""
        x, pre_gelu, w_in, w_out = ctx.saved_tensors
        needs_x, needs_w_in, _, needs_w_out, needs_b_out = ctx.needs_input_grad
        post_gelu, d_pre_gelu, d_b_in = _gelu_backward(pre_gelu, d_y @ w_out.to(d_y.dtype))  # (n, F), (n, F), (F,)
        return (  # under LoRA the weights are frozen, and the first block's input needs no gradient either
            d_pre_gelu @ w_in.to(d_y.dtype) if needs_x else None,
            d_pre_gelu.T @ x if needs_w_in else None,
            d_b_in,
            d_y.T @ post_gelu if needs_w_out else None,
            d_y.sum(0, dtype=torch.float32) if needs_b_out else None,
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
