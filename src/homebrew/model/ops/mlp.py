"""The MLP, fused on a GPU.

The hidden layer of the MLP has GPT-2's widest activations, 4·C values per token. Only the first matrix product is saved
for the backward pass, in which one kernel recomputes the GELU and computes its gradient and the first bias's gradient.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from homebrew.model.ops import uses_triton
from homebrew.model.ops.autocast import compute_dtype
from homebrew.model.ops.linear import linear_backward
from homebrew.model.ops.matmul import matmul, matmul_into


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
    if not (torch.is_grad_enabled() and uses_triton(x)):
        return F.linear(F.gelu(F.linear(x, w_in, b_in), approximate="tanh"), w_out, b_out)
    y: Tensor = _mlp(x.to(compute_dtype(x)).flatten(0, -2), w_in, b_in, w_out, b_out)[0]
    return y.view(x.shape)


@torch.library.custom_op("homebrew::mlp", mutates_args=(), tags=(torch.Tag.flexible_layout,))
def _mlp(x: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the output (n, C) of rows (n, C), and the first product (n, F), the GELU's input without the bias.

    The GELU's kernels add the bias `b_in`, because a matrix product that adds a bias is slower.
    """
    from homebrew.model.ops.triton_kernels import gelu

    product = matmul_into(x.new_empty(x.shape[0], w_in.shape[0]), x, w_in.to(x.dtype).T)
    y = matmul_into(x.new_empty(x.shape), gelu(product, b_in), w_out.to(x.dtype).T, b_out.to(x.dtype))
    return y, product


@_mlp.register_fake
def _(x: Tensor, w_in: Tensor, _b_in: Tensor, _w_out: Tensor, _b_out: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[0], w_in.shape[0])


@torch.library.custom_op("homebrew::gelu_backward", mutates_args=(), tags=(torch.Tag.flexible_layout,))
def _gelu_backward(x: Tensor, bias: Tensor, d_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from homebrew.model.ops.triton_kernels import gelu_backward

    return gelu_backward(x.contiguous(), bias, d_y.contiguous())


@_gelu_backward.register_fake
def _(x: Tensor, _bias: Tensor, _d_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x), x.new_empty(x.shape[1], dtype=torch.float32)


def _setup_context(
    ctx: Any,  # noqa: ANN401 - autograd's context
    inputs: tuple[Tensor, ...],
    output: tuple[Tensor, Tensor],
) -> None:
    x, w_in, b_in, w_out, _ = inputs
    _, product = output
    ctx.save_for_backward(x if w_in.requires_grad else None, product, w_in, b_in, w_out)
    ctx.mark_non_differentiable(product)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_y: Tensor, _: None) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - autograd's context
    """Compute the gradients of the inputs that need one. Autograd casts each to its input's dtype."""
    x, product, w_in, b_in, w_out = ctx.saved_tensors
    needs_x, needs_w_in, _, needs_w_out, needs_b_out = ctx.needs_input_grad
    d_post_gelu = matmul(d_y, w_out.to(d_y.dtype))  # (n, F)
    post_gelu, d_pre_gelu, d_b_in = _gelu_backward(product, b_in, d_post_gelu)  # (n, F), (n, F), (F,)
    d_x, d_w_in = linear_backward(d_pre_gelu, x, w_in, needs_x, needs_w_in)
    return (  # under LoRA the weights are frozen, and the first block's input needs no gradient either
        d_x if needs_x else None,
        d_w_in if needs_w_in else None,
        d_b_in,
        matmul(d_y, post_gelu, transpose_a=True) if needs_w_out else None,
        d_y.sum(0, dtype=torch.float32) if needs_b_out else None,
    )


_mlp.register_autograd(_backward, setup_context=_setup_context)
