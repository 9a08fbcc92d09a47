"""The language-model head and its loss, in one pass that never holds all logits.

GPT-2's logits are the largest tensor of a training step: 50,304 for each token. Here the head runs over some
thousand tokens at a time, the softmax's gradient takes the logits' place in memory, and what leaves is the
gradient of the head's input and of its weight, ready for the backward pass (the idea of llm.c's fused
classifier and of Hsu et al. 2024, "Liger Kernel").
"""

import importlib.util
from typing import Any

import torch
from torch import Tensor

from homebrew.constants import IGNORE_INDEX
from homebrew.model.ops.autocast import compute_dtype

TOKENS_AT_ONCE = 16_384
"""Tokens whose logits exist at the same time: 1.6 GB of GPT-2's in bfloat16, and large matrix products."""

FROZEN_TOKENS_AT_ONCE = 4_096
"""The same where the head is frozen, as under LoRA: without its gradient's sum, small chunks are as fast."""

CPU_LOGITS_AT_ONCE = 128 * 50_304
"""The same for a CPU, as a number of logits: fewer make thin matrix products, many more leave the caches."""

_HAS_TRITON = importlib.util.find_spec("triton") is not None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Mean cross entropy of the next token, over the targets that are scored.

    Under autocast the matrix products run in its dtype; softmax, sums and the weight's gradient are float32.

    Args:
        hidden: the last layer's output, (B, T, C), any float dtype.
        weight: the head's rows, one a token id, (padded V, C); rows from `vocab_size` on are padding.
        targets: the next token's ids, (B, T), int64; `IGNORE_INDEX` is not scored.
        vocab_size: ids that exist; the padding's logits take no part in the softmax.

    Returns:
        The mean in nats, a float32 scalar; 0 where no target is scored.
    """
    trains = torch.is_grad_enabled()
    total, _, _ = _head_loss(
        hidden.flatten(0, 1).to(compute_dtype(hidden)),
        weight,
        targets.flatten(),
        vocab_size,
        trains and hidden.requires_grad,
        trains and weight.requires_grad,
    )
    loss: Tensor = total / (targets != IGNORE_INDEX).sum().clamp(min=1)
    return loss


@torch.library.custom_op("homebrew::linear_cross_entropy", mutates_args=())
def _head_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, grad_hidden: bool, grad_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Summed cross entropy with its gradients by `hidden` (N, C) and `weight`; an unwanted one is empty."""
    total = hidden.new_zeros((), dtype=torch.float32)
    d_hidden, d_weight = _empty_gradients(hidden, weight, grad_hidden, grad_weight)
    d_weight.zero_()
    rows = weight.to(hidden.dtype)  # (padded V, C)
    size = TOKENS_AT_ONCE if grad_weight else FROZEN_TOKENS_AT_ONCE
    if not hidden.is_cuda:
        size = min(size, max(1, CPU_LOGITS_AT_ONCE // len(weight)))
    buffers = _Buffers(hidden[:size], weight, vocab_size)
    for start in range(0, len(hidden), size):
        x, y = hidden[start : start + size], targets[start : start + size]
        logits = torch.mm(x, rows.T, out=buffers.logits[: len(x)])  # (n, padded V)
        total += _score_(logits, y, vocab_size, grad_hidden or grad_weight, buffers.scores[: len(x)])
        if grad_hidden:
            torch.mm(logits, rows, out=d_hidden[start : start + size])
        if grad_weight:
            _add_product_(d_weight, logits.T, x, buffers.product)
    return total, d_hidden, d_weight


@_head_loss.register_fake
def _(
    hidden: Tensor, weight: Tensor, _targets: Tensor, _vocab_size: int, grad_hidden: bool, grad_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    total = hidden.new_empty((), dtype=torch.float32)
    return total, *_empty_gradients(hidden, weight, grad_hidden, grad_weight)


class _Buffers:
    """What every chunk writes over: on a CPU, memory taken anew is paid for page by page.

    Args:
        hidden: the first chunk, (n, C).
        weight: the head's rows, (padded V, C).
        vocab_size: V.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, vocab_size: int) -> None:
        by_kernel = hidden.is_cuda and _HAS_TRITON
        in_one = hidden.is_cuda or hidden.dtype == _summed(weight.dtype)
        self.logits = hidden.new_empty(len(hidden), len(weight))
        self.scores = hidden.new_empty(len(hidden), 0 if by_kernel else vocab_size, dtype=torch.float32)
        self.product = hidden.new_empty((0,) if in_one else weight.shape)


def _add_product_(total: Tensor, a: Tensor, b: Tensor, buffer: Tensor) -> None:
    """`total += a @ b`, on a GPU summed in `total`'s dtype within the matrix product; elsewhere through a buffer."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda and total.dtype == torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += torch.mm(a, b, out=buffer)


def _empty_gradients(hidden: Tensor, weight: Tensor, grad_hidden: bool, grad_weight: bool) -> tuple[Tensor, Tensor]:
    d_hidden = hidden.new_empty(hidden.shape if grad_hidden else (0,))
    d_weight = weight.new_empty(weight.shape if grad_weight else (0,), dtype=_summed(weight.dtype))
    return d_hidden, d_weight


def _summed(dtype: torch.dtype) -> torch.dtype:
    """What the chunks' gradients of a weight of some dtype are summed in."""
    return torch.promote_types(dtype, torch.float32)


def _keep_gradients(
    ctx: Any,  # noqa: ANN401 - autograd's own
    inputs: tuple[Any, ...],
    output: tuple[Tensor, ...],
) -> None:
    ctx.weight_dtype = inputs[1].dtype
    _, d_hidden, d_weight = output
    ctx.save_for_backward(d_hidden, d_weight)
    ctx.mark_non_differentiable(d_hidden, d_weight)
    ctx.set_materialize_grads(False)


def _scale_gradients(
    ctx: Any,  # noqa: ANN401 - autograd's own
    grad_total: Tensor,
    *_: None,
) -> tuple[Tensor | None, ...]:
    """The gradients at hand, times the loss's own; in float32, for a bfloat16 factor would shift them all."""
    dtypes = (ctx.saved_tensors[0].dtype, ctx.weight_dtype)
    d_hidden, d_weight = (
        (saved.float() * grad_total).to(dtype) if needed else None
        for saved, dtype, needed in zip(ctx.saved_tensors, dtypes, ctx.needs_input_grad, strict=False)
    )
    return d_hidden, d_weight, None, None, None, None


_head_loss.register_autograd(_scale_gradients, setup_context=_keep_gradients)


def _score_(logits: Tensor, targets: Tensor, vocab_size: int, with_gradient: bool, scores: Tensor) -> Tensor:
    """Summed cross entropy of the rows; with a gradient, it takes the logits' place.

    Args:
        logits: (n, padded V); overwritten.
        targets: (n,), int64.
        vocab_size: V; what lies beyond has no probability, and gradient 0.
        with_gradient: whether to write it.
        scores: (n, V), float32, to work in; unused where there is a kernel.
    """
    if logits.is_cuda and _HAS_TRITON:
        from homebrew.model.ops.triton_kernels import score_

        return score_(logits, targets, vocab_size, with_gradient, IGNORE_INDEX)
    ignored = (targets == IGNORE_INDEX)[:, None]  # (n, 1)
    index = targets[:, None].masked_fill(ignored, 0)
    scores.copy_(logits[:, :vocab_size])
    scores.sub_(scores.amax(-1, keepdim=True))
    chosen = scores.gather(1, index)
    sums = scores.exp_().sum(-1, keepdim=True)
    if with_gradient:
        scores.div_(sums.masked_fill(ignored, torch.inf))  # a row that is not scored becomes 0
        scores.scatter_add_(1, index, ignored.float() - 1.0)
        logits[:, :vocab_size] = scores
        logits[:, vocab_size:] = 0.0
    return (sums.log() - chosen).masked_fill_(ignored, 0.0).sum()
