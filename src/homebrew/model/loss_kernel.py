"""Cross entropy and its gradient on a GPU: the logits are read, and their gradient takes their place.

Each program takes one row and walks over it twice: once for the softmax's denominator (Milakov and Gimelshein
2018, "Online normalizer calculation for softmax"), once to write the gradient. A row of GPT-2's is 100 kB in
bfloat16, so the second walk finds it in cache.
"""
# Triton reads a kernel's annotations, and writes its constants in capitals.
# ruff: noqa: ANN001, ANN202, N803
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 8192
"""Columns a program holds at a time."""

WARPS = 16
"""Warps (32 threads each) of a program with a whole block."""


def score_(logits: Tensor, targets: Tensor, vocab_size: int, with_gradient: bool, ignore_index: int) -> Tensor:
    """Summed cross entropy of the rows; with a gradient, it takes the logits' place.

    Args:
        logits: (n, padded V), rows contiguous; overwritten.
        targets: (n,), int64; one outside the vocabulary makes the sum infinite.
        vocab_size: V; what lies beyond has no probability, and gradient 0.
        with_gradient: whether to write it.
        ignore_index: a target with this value adds nothing.
    """
    rows, columns = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    block = min(BLOCK, triton.next_power_of_2(columns))
    _score_row[(rows,)](
        logits,
        targets,
        losses,
        logits.stride(0),
        VOCAB_SIZE=vocab_size,
        NUM_COLUMNS=columns,
        IGNORE_INDEX=ignore_index,
        WITH_GRADIENT=with_gradient,
        BLOCK=block,
        num_warps=min(max(block // 256, 1), WARPS),
    )
    return losses.sum()


@triton.jit
def _score_row(
    logits,
    targets,
    losses,
    stride,
    VOCAB_SIZE: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
    IGNORE_INDEX: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target = tl.load(targets + row)
    columns = tl.arange(0, BLOCK)
    if target == IGNORE_INDEX:
        tl.store(losses + row, 0.0)
        if WITH_GRADIENT:
            zeros = tl.zeros([BLOCK], dtype=logits.dtype.element_ty)
            for start in range(0, NUM_COLUMNS, BLOCK):
                tl.store(logits + start + columns, zeros, mask=start + columns < NUM_COLUMNS)
    else:
        # Each lane keeps the maximum of the columns it saw, and the sum of their exponentials relative to it.
        maximum = tl.full([BLOCK], -1e30, dtype=tl.float32)
        total = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(0, VOCAB_SIZE, BLOCK):
            inside = start + columns < VOCAB_SIZE
            x = tl.load(logits + start + columns, mask=inside, other=-1e30, eviction_policy="evict_last").to(tl.float32)
            factor = tl.exp(-tl.abs(x - maximum))
            total = tl.where(x > maximum, total * factor + 1.0, total + factor)
            maximum = tl.maximum(maximum, x)
        row_maximum = tl.max(maximum, axis=0)
        log_total = row_maximum + tl.log(tl.sum(total * tl.exp(maximum - row_maximum), axis=0))
        exists = (target >= 0) & (target < VOCAB_SIZE)
        at_target = tl.load(logits + target, mask=exists, other=float("-inf")).to(tl.float32)
        tl.store(losses + row, log_total - at_target)
        if WITH_GRADIENT:
            tl.debug_barrier()  # every thread has read the target's logit before one overwrites it
            for start in range(0, NUM_COLUMNS, BLOCK):
                offsets = start + columns
                x = tl.load(
                    logits + offsets,
                    mask=offsets < VOCAB_SIZE,
                    other=float("-inf"),
                    eviction_policy="evict_first",
                )
                gradient = tl.exp(x.to(tl.float32) - log_total) - tl.where(offsets == target, 1.0, 0.0)
                tl.store(logits + offsets, gradient.to(logits.dtype.element_ty), mask=offsets < NUM_COLUMNS)
