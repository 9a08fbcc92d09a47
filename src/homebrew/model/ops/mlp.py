"""The MLP, whose matrix products compute the GELU and its gradient on a GPU."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from homebrew.model.ops.autocast import compute_dtype
from homebrew.model.ops.linear import linear_backward
from homebrew.model.ops.matmul import is_tunable, matmul_gelu_backward_into, matmul_gelu_into, matmul_into


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
    dtype = compute_dtype(x)
    if not (torch.is_grad_enabled() and is_tunable(x.device, dtype)):
        return F.linear(F.gelu(F.linear(x, w_in, b_in), approximate="tanh"), w_out, b_out)
    y: Tensor = _mlp(x.to(dtype).flatten(0, -2), w_in, b_in, w_out, b_out)[0]
    return y.view(x.shape)


@torch.library.custom_op("homebrew::mlp", mutates_args=(), tags=(torch.Tag.flexible_layout,))
def _mlp(x: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the output (n, C) of rows (n, C), and the values before and after the GELU, (n, F) each."""
    pre_gelu, post_gelu = (x.new_empty(x.shape[0], w_in.shape[0]) for _ in range(2))
    matmul_gelu_into(post_gelu, pre_gelu, x, w_in.to(x.dtype).T, b_in.to(x.dtype))
    y = matmul_into(x.new_empty(x.shape), post_gelu, w_out.to(x.dtype).T, b_out.to(x.dtype))
    return y, pre_gelu, post_gelu


@_mlp.register_fake
def _(x: Tensor, w_in: Tensor, _b_in: Tensor, _w_out: Tensor, _b_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    pre_gelu, post_gelu = (x.new_empty(x.shape[0], w_in.shape[0]) for _ in range(2))
    return x.new_empty(x.shape), pre_gelu, post_gelu


@torch.library.custom_op("homebrew::mlp_backward", mutates_args=(), tags=(torch.Tag.flexible_layout,))
def _mlp_backward(d_y: Tensor, w_out: Tensor, pre_gelu: Tensor) -> Tensor:
    """Compute the gradient for the values before the GELU, (n, F), from that for the output, (n, C)."""
    d_pre_gelu = d_y.new_empty(pre_gelu.shape)
    return matmul_gelu_backward_into(d_pre_gelu, d_y, w_out.to(d_y.dtype), pre_gelu.contiguous())


@_mlp_backward.register_fake
def _(d_y: Tensor, _w_out: Tensor, pre_gelu: Tensor) -> Tensor:
    return d_y.new_empty(pre_gelu.shape)


def _setup_context(
    ctx: Any,  # noqa: ANN401 - autograd's context
    inputs: tuple[Tensor, ...],
    output: tuple[Tensor, Tensor, Tensor],
) -> None:
    x, w_in, _, w_out, _ = inputs
    _, pre_gelu, post_gelu = output
    saved = (x if w_in.requires_grad else None, pre_gelu, post_gelu if w_out.requires_grad else None)
    ctx.save_for_backward(*saved, w_in, w_out)
    ctx.mark_non_differentiable(pre_gelu, post_gelu)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_y: Tensor, *_: None) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - autograd's context
    """Compute the gradients of the inputs that need one. Autograd casts each to its input's dtype."""
    x, pre_gelu, post_gelu, w_in, w_out = ctx.saved_tensors
    needs_x, needs_w_in, needs_b_in, needs_w_out, needs_b_out = ctx.needs_input_grad
    needs = {"needs_x": False, "needs_weight": needs_w_out, "needs_bias": needs_b_out}
    _, d_w_out, d_b_out = linear_backward(d_y, post_gelu, w_out, **needs)
    d_pre_gelu = _mlp_backward(d_y, w_out, pre_gelu)
    d_x, d_w_in, d_b_in = linear_backward(d_pre_gelu, x, w_in, needs_x, needs_w_in, needs_b_in)
    gradients = (d_x, d_w_in, d_b_in, d_w_out, d_b_out)
    # Under LoRA the weights are frozen, and the first block's input needs no gradient either.
    return tuple(d if needed else None for d, needed in zip(gradients, ctx.needs_input_grad, strict=True))


_mlp.register_autograd(_backward, setup_context=_setup_context)
