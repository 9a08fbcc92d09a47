"""Triton kernel for the head's cross-entropy.

This module is imported only if a tensor is on a GPU and Triton is installed.
"""

# Triton interprets a kernel's annotations, and a kernel's constants are written in capitals.
# ruff: noqa: ANN001, ANN202, N803
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"

import torch
import triton
import triton.language as tl
from torch import Tensor

LOSS_BLOCK = 4096
"""Columns per block of `cross_entropy_inplace`, 4 for each thread."""

LOSS_UNROLL = 3
"""Number of blocks per rescaling of the running sum. Rescaling every block would take a quarter more exponentials."""


def cross_entropy_inplace(
    logits: Tensor, targets: Tensor, vocab_size: int, with_gradient: bool, ignore_index: int
) -> Tensor:
    """Compute the summed cross-entropy, and optionally write the gradient over the logits.

    One program per row reads the row twice: for the softmax's denominator (Milakov and Gimelshein 2018, "Online
    normalizer calculation for softmax"), and to write the gradient. A row of GPT-2's logits has 100 kB in bfloat16,
    so the second read hits the cache.

    Args:
        logits: Logits, (n, padded V), with contiguous rows. Overwritten by their gradient if `with_gradient`.
        targets: Ids of the next tokens, (n,), int64. An id outside the vocabulary makes the sum infinite.
        vocab_size: Vocabulary size V. The padding has probability 0 and gradient 0.
        with_gradient: Whether to write the gradient.
        ignore_index: Value of targets to ignore.

    Returns:
        The sum, a float32 scalar.
    """
    rows, columns = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    block = min(LOSS_BLOCK, triton.next_power_of_2(columns))
    with torch.cuda.device_of(logits):  # type: ignore[no-untyped-call] # Triton launches on the current device
        _cross_entropy_kernel[(rows,)](
            logits,
            targets,
            losses,
            logits.stride(0),
            VOCAB_SIZE=vocab_size,
            NUM_COLUMNS=columns,
            IGNORE_INDEX=ignore_index,
            WITH_GRADIENT=with_gradient,
            BLOCK=block,
            UNROLL=LOSS_UNROLL,
            num_warps=max(block // 128, 1),
        )
    return losses.sum()


@triton.jit
def _cross_entropy_kernel(
    logits,
    targets,
    losses,
    stride,
    VOCAB_SIZE: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
    IGNORE_INDEX: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    log2_e: tl.constexpr = 1.4426950408889634
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
        in_vocab = (target >= 0) & (target < VOCAB_SIZE)
        target_logit = tl.load(logits + target, mask=in_vocab, other=float("-inf")).to(tl.float32)
        # Each lane keeps a running maximum of its columns, and the sum of their powers of 2 relative to it.
        maximum = tl.full([BLOCK], -1e30, dtype=tl.float32)
        total = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(0, VOCAB_SIZE, UNROLL * BLOCK):
            values = ()
            new_maximum = maximum
            for index in tl.static_range(UNROLL):
                offsets = start + index * BLOCK + columns
                x = tl.load(logits + offsets, mask=offsets < VOCAB_SIZE, other=-1e30).to(tl.float32) * log2_e
                values = values + (x,)  # noqa: RUF005 - Triton does not support unpacking
                new_maximum = tl.maximum(new_maximum, x)
            total *= tl.exp2(maximum - new_maximum)
            for index in tl.static_range(UNROLL):
                total += tl.exp2(values[index] - new_maximum)
            maximum = new_maximum
        row_maximum = tl.max(maximum, axis=0)
        log2_total = row_maximum + tl.log2(tl.sum(total * tl.exp2(maximum - row_maximum), axis=0))
        tl.store(losses + row, log2_total / log2_e - target_logit)
        if WITH_GRADIENT:
            tl.debug_barrier()  # all threads have read the target's logit before it is overwritten
            for start in range(0, NUM_COLUMNS, BLOCK):
                offsets = start + columns
                x = tl.load(logits + offsets, mask=offsets < VOCAB_SIZE, other=float("-inf"))
                probability = tl.exp2(x.to(tl.float32) * log2_e - log2_total)
                tl.store(logits + offsets, probability.to(x.dtype), mask=offsets < NUM_COLUMNS)
            tl.debug_barrier()  # the target's probability is stored before it is replaced by its gradient
            target_gradient = tl.exp2(target_logit * log2_e - log2_total) - 1.0
            tl.store(logits + target, target_gradient.to(logits.dtype.element_ty), mask=in_vocab)
