"""Linear layers whose matrix products use the fastest algorithm."""

from typing import Any

import torch
from torch import Tensor, nn

from homebrew.model.hooks import has_global_hooks, module_hooks
from homebrew.model.ops.autocast import compute_dtype
from homebrew.model.ops.matmul import is_tunable, matmul_into


def is_plain(layer: nn.Module) -> bool:
    """Return whether a call of a module only computes x Wᵀ + b, so that its weight and bias may be used directly."""
    return (
        type(layer) is nn.Linear
        and type(layer.weight) in (nn.Parameter, Tensor)  # not a subclass, such as a quantized weight
        and layer.bias is not None
        and "forward" not in vars(layer)
        and not any(module_hooks(layer))
        and not has_global_hooks()
    )


def apply_linear(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a linear layer. In training, a plain layer uses the fastest matrix products.

    Args:
        layer: Linear layer from C to F features, which may have an adapter.
        x: Input, (..., C), any float dtype. Under autocast, matrix products run in autocast's dtype.

    Returns:
        Tensor of shape (..., F).
    """
    dtype = compute_dtype(x)
    y: Tensor
    if torch.is_grad_enabled() and is_tunable(x.device, dtype) and is_plain(layer):
        y = _linear(x.to(dtype).flatten(0, -2), layer.weight, layer.bias)
        return y.view(*x.shape[:-1], y.shape[-1])
    y = layer(x)
    return y


@torch.library.custom_op("homebrew::linear", mutates_args=(), tags=(torch.Tag.flexible_layout,))
def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Apply a linear layer to rows, (n, C) to (n, F)."""
    out = x.new_empty(x.shape[0], weight.shape[0])
    return matmul_into(out, x, weight.to(x.dtype).T, bias.to(x.dtype))


@_linear.register_fake
def _(x: Tensor, weight: Tensor, _bias: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.custom_op("homebrew::linear_backward", mutates_args=(), tags=(torch.Tag.flexible_layout,))
def linear_backward(
    d_y: Tensor, x: Tensor | None, weight: Tensor, needs_x: bool, needs_weight: bool, needs_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of a linear layer's input, weight and bias.

    This is one operator because `torch.compile` may compute an input again for each operator that reads it.

    Args:
        d_y: Gradient for the output, (n, F).
        x: Input, (n, C). Not needed if the weight needs no gradient.
        weight: Weight, (F, C).
        needs_x: Whether the input needs a gradient.
        needs_weight: Whether the weight needs a gradient.
        needs_bias: Whether the bias needs a gradient.

    Returns:
        The gradients, the first two in the dtype of `d_y`, that of the bias in float32. A gradient that is not needed
        is an empty tensor.
    """
    d_x, d_weight = _allocate_grads(d_y, weight, needs_x, needs_weight)
    if needs_x:
        matmul_into(d_x, d_y, weight.to(d_y.dtype))
    if needs_weight and x is not None:
        matmul_into(d_weight, d_y.T, x)
    return d_x, d_weight, _column_sums(d_y) if needs_bias else d_y.new_empty(0, dtype=torch.float32)


@linear_backward.register_fake
def _(
    d_y: Tensor, _x: Tensor | None, weight: Tensor, needs_x: bool, needs_weight: bool, needs_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    d_bias = d_y.new_empty(weight.shape[0] if needs_bias else 0, dtype=torch.float32)
    return *_allocate_grads(d_y, weight, needs_x, needs_weight), d_bias


def _allocate_grads(d_y: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool) -> tuple[Tensor, Tensor]:
    d_x = d_y.new_empty((d_y.shape[0], weight.shape[1]) if needs_x else (0,))
    return d_x, d_y.new_empty(weight.shape if needs_weight else (0,))


def _column_sums(x: Tensor) -> Tensor:
    """Sum a matrix over its rows, (n, F) to (F,), in float32."""
    if x.is_cuda:  # a product with a row of ones is faster than PyTorch's sum
        return torch.mm(x.new_ones(1, x.shape[0]), x, out_dtype=torch.float32).flatten()
    return x.sum(0, dtype=torch.float32)


def _setup_context(
    ctx: Any,  # noqa: ANN401 - autograd's context
    inputs: tuple[Tensor, ...],
    output: Tensor,  # noqa: ARG001 - passed by name
) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x if weight.requires_grad else None, weight)


def _backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - autograd's context
    """Compute the gradients of the inputs that need one. Autograd casts each to its input's dtype."""
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad
    d_x, d_weight, d_bias = linear_backward(d_y, x, weight, needs_x, needs_weight, needs_bias)
    return d_x if needs_x else None, d_weight if needs_weight else None, d_bias if needs_bias else None


_linear.register_autograd(_backward, setup_context=_setup_context)
