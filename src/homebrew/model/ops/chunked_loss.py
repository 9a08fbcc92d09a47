"""The language-model head with its cross-entropy loss, in chunks of tokens.

The logits of all tokens would be the largest tensor of a training step: GPT-2 has 50,304 per token. Here the head runs
on a chunk of tokens at a time. The gradient of the logits overwrites the chunk's logits and is at once multiplied by
the head's weight and input, so that only the gradients of input and weight remain for the backward pass (the idea of
llm.c's fused classifier and of Hsu et al. 2024, "Liger Kernel").

Dimensions: N number of tokens (B·T), n tokens in a chunk, C embedding dimension, V vocabulary size.
"""

from typing import Any

import torch
from torch import Tensor

from homebrew.constants import IGNORE_INDEX
from homebrew.model.ops import uses_triton
from homebrew.model.ops.autocast import compute_dtype
from homebrew.model.ops.matmul import matmul_into

CHUNK_TOKENS = 16_384
"""Tokens per chunk. GPT-2's logits then take 1.6 GB in bfloat16, and the matrix products are large."""

FROZEN_CHUNK_TOKENS = 4_096
"""Tokens per chunk if the head is frozen, as with LoRA. Without a weight gradient, smaller chunks are as fast."""

CPU_CHUNK_LOGITS = 128 * 50_304
"""Logits per chunk on a CPU. With fewer, matrix products are inefficient; many more do not fit into the caches."""


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Compute the mean cross-entropy of the next token, over targets that are not ignored.

    Under autocast the matrix products run in autocast's dtype. Softmax, sums and the weight's gradient are float32.

    Args:
        hidden: Output of the last layer, (B, T, C), any float dtype.
        weight: Weight of the head, (padded V, C). Rows from `vocab_size` on are padding.
        targets: Ids of the next tokens, (B, T), int64. Positions with `IGNORE_INDEX` are ignored.
        vocab_size: Vocabulary size V. The logits of the padding are excluded from the softmax.

    Returns:
        The mean in nats, a float32 scalar, or 0 if all targets are ignored.
    """
    grad_enabled = torch.is_grad_enabled()
    total, _, _ = _chunked_loss_and_grads(
        hidden.flatten(0, 1).to(compute_dtype(hidden)),
        weight,
        targets.flatten().contiguous(),  # as the kernel reads them
        vocab_size,
        grad_enabled and hidden.requires_grad,
        grad_enabled and weight.requires_grad,
    )
    loss: Tensor = total / (targets != IGNORE_INDEX).sum().clamp(min=1)
    return loss


@torch.library.custom_op("homebrew::linear_cross_entropy", mutates_args=())
def _chunked_loss_and_grads(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, grad_hidden: bool, grad_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the summed cross-entropy and its gradients for `hidden` (N, C) and `weight` (padded V, C).

    A gradient that is not requested is an empty tensor.
    """
    total = hidden.new_zeros((), dtype=torch.float32)
    d_hidden, d_weight = _allocate_grads(hidden, weight, grad_hidden, grad_weight)
    d_weight.zero_()
    w = weight.to(hidden.dtype)  # (padded V, C)
    size = CHUNK_TOKENS if grad_weight else FROZEN_CHUNK_TOKENS
    if not hidden.is_cuda:
        size = min(size, max(1, CPU_CHUNK_LOGITS // len(weight)))
    buffers = _Buffers(hidden[:size], weight, vocab_size)
    for start in range(0, len(hidden), size):
        x, y = hidden[start : start + size], targets[start : start + size]
        logits = matmul_into(buffers.logits[: len(x)], x, w.T)  # (n, padded V)
        total += _cross_entropy_inplace(logits, y, vocab_size, grad_hidden or grad_weight, buffers.float32[: len(x)])
        # `logits` now holds its own gradient, if one was requested.
        if grad_hidden:
            matmul_into(d_hidden[start : start + size], logits, w)
        if grad_weight:
            _add_matmul_inplace(d_weight, logits.T, x, buffers.product)
    return total, d_hidden, d_weight


@_chunked_loss_and_grads.register_fake
def _(
    hidden: Tensor, weight: Tensor, _targets: Tensor, _vocab_size: int, grad_hidden: bool, grad_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    total = hidden.new_empty((), dtype=torch.float32)
    return total, *_allocate_grads(hidden, weight, grad_hidden, grad_weight)


class _Buffers:
    """Scratch buffers reused by every chunk. On a CPU, new memory is slow because each page is mapped on first use.

    Args:
        hidden: The first chunk, (n, C).
        weight: Weight of the head, (padded V, C).
        vocab_size: Vocabulary size V.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, vocab_size: int) -> None:
        self.logits = hidden.new_empty(len(hidden), len(weight))
        self.float32 = hidden.new_empty(len(hidden), 0 if uses_triton(hidden) else vocab_size, dtype=torch.float32)
        self.product = hidden.new_empty(0)  # the first torch.mm(out=...) sets its shape


def _add_matmul_inplace(total: Tensor, a: Tensor, b: Tensor, buffer: Tensor) -> None:
    """Compute `total += a @ b`. On a GPU the matrix product itself accumulates in the dtype of `total`."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda and total.dtype == torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += torch.mm(a, b, out=buffer)


def _allocate_grads(hidden: Tensor, weight: Tensor, grad_hidden: bool, grad_weight: bool) -> tuple[Tensor, Tensor]:
    d_hidden = hidden.new_empty(hidden.shape if grad_hidden else (0,))
    sum_dtype = torch.promote_types(weight.dtype, torch.float32)  # for the sum over the chunks' weight gradients
    d_weight = weight.new_empty(weight.shape if grad_weight else (0,), dtype=sum_dtype)
    return d_hidden, d_weight


def _setup_context(
    ctx: Any,  # noqa: ANN401 - autograd's context
    inputs: tuple[Any, ...],  # noqa: ARG001 - passed by name
    output: tuple[Tensor, ...],
) -> None:
    _, d_hidden, d_weight = output
    ctx.save_for_backward(d_hidden, d_weight)
    ctx.mark_non_differentiable(d_hidden, d_weight)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any,  # noqa: ANN401 - autograd's context
    grad_total: Tensor,
    *_: None,
) -> tuple[Tensor | None, ...]:
    """Multiply the saved gradients by the loss's gradient, in float32: a factor in bfloat16 would bias all gradients.

    Autograd casts the products to the inputs' dtypes, and ignores the product for an input that needs no gradient.
    """
    d_hidden, d_weight = (saved.float() * grad_total for saved in ctx.saved_tensors)
    return d_hidden, d_weight, None, None, None, None


_chunked_loss_and_grads.register_autograd(_backward, setup_context=_setup_context)


def _cross_entropy_inplace(
    logits: Tensor, targets: Tensor, vocab_size: int, with_gradient: bool, buffer: Tensor
) -> Tensor:
    """Compute the summed cross-entropy, and optionally write the gradient over the logits.

    Args:
        logits: Logits, (n, padded V), overwritten by their gradient if `with_gradient`.
        targets: Ids of the next tokens, (n,), int64.
        vocab_size: Vocabulary size V. The padding has probability 0 and gradient 0.
        with_gradient: Whether to write the gradient.
        buffer: Scratch buffer, (n, V), float32. Not used with the Triton kernel.

    Returns:
        The sum, a float32 scalar.
    """
    if uses_triton(logits):
        from homebrew.model.ops.triton_kernels import cross_entropy_inplace

        return cross_entropy_inplace(logits, targets, vocab_size, with_gradient, IGNORE_INDEX)
    ignored = (targets == IGNORE_INDEX)[:, None]  # (n, 1)
    index = targets[:, None].masked_fill(ignored, 0)  # (n, 1)
    buffer.copy_(logits[:, :vocab_size])
    buffer.sub_(buffer.amax(1, keepdim=True))
    target_logits = buffer.gather(1, index)  # (n, 1)
    sums = buffer.exp_().sum(1, keepdim=True)  # (n, 1)
    if with_gradient:
        buffer.div_(sums.masked_fill(ignored, torch.inf))  # softmax; 0 in rows with an ignored target
        buffer.scatter_add_(1, index, ignored.float() - 1.0)
        logits[:, :vocab_size] = buffer
        logits[:, vocab_size:] = 0.0
    return (sums.log() - target_logits).masked_fill_(ignored, 0.0).sum()
