"""Triton kernels for what a GPU spends on moving bytes: the head's loss and the MLP's GELU.

Imported only where a tensor is on a GPU and Triton is installed.
"""

# Triton reads a kernel's annotations, and writes its constants in capitals.
# ruff: noqa: ANN001, ANN202, N803
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"

import torch
import triton
import triton.language as tl
from torch import Tensor

SCORE_BLOCK = 4096
"""Columns that a program of `score_` takes at a time, 4 for each thread."""

SCORE_UNROLLED = 3
"""As many times of them share one correction of the sum so far: a fifth fewer exponentials than one by one."""

GELU_BLOCK = (32, 128)
"""Rows and columns that a program of `gelu_backward` holds at a time."""

GELU_ROWS = 256
"""Rows that one program of `gelu_backward` walks down, keeping its columns' sums."""


def score_(logits: Tensor, targets: Tensor, vocab_size: int, with_gradient: bool, ignore_index: int) -> Tensor:
    """Summed cross entropy of the rows; with a gradient, it takes the logits' place.

    A program walks over its row twice: for the softmax's denominator (Milakov and Gimelshein 2018, "Online
    normalizer calculation for softmax"), and to write the gradient. A row of GPT-2's is 100 kB in bfloat16,
    and the second walk finds it in cache.

    Args:
        logits: (n, padded V), rows contiguous; overwritten.
        targets: (n,), int64; one outside the vocabulary makes the sum infinite.
        vocab_size: V; what lies beyond has no probability, and gradient 0.
        with_gradient: whether to write it.
        ignore_index: a target with this value adds nothing.
    """
    rows, columns = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    block = min(SCORE_BLOCK, triton.next_power_of_2(columns))
    with torch.cuda.device_of(logits):  # type: ignore[no-untyped-call] # where Triton launches
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
            UNROLLED=SCORE_UNROLLED,
            num_warps=max(block // 128, 1),
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
    UNROLLED: tl.constexpr,
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
        exists = (target >= 0) & (target < VOCAB_SIZE)
        at_target = tl.load(logits + target, mask=exists, other=float("-inf")).to(tl.float32)
        # Each lane keeps the maximum of the columns it saw and the sum of their powers of 2 relative to it.
        maximum = tl.full([BLOCK], -1e30, dtype=tl.float32)
        total = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(0, VOCAB_SIZE, UNROLLED * BLOCK):
            held = ()
            higher = maximum
            for index in tl.static_range(UNROLLED):
                offsets = start + index * BLOCK + columns
                x = tl.load(logits + offsets, mask=offsets < VOCAB_SIZE, other=-1e30).to(tl.float32) * log2_e
                held = held + (x,)  # noqa: RUF005 - Triton knows no unpacking
                higher = tl.maximum(higher, x)
            total *= tl.exp2(maximum - higher)
            for index in tl.static_range(UNROLLED):
                total += tl.exp2(held[index] - higher)
            maximum = higher
        highest = tl.max(maximum, axis=0)
        log2_total = highest + tl.log2(tl.sum(total * tl.exp2(maximum - highest), axis=0))
        tl.store(losses + row, log2_total / log2_e - at_target)
        if WITH_GRADIENT:
            tl.debug_barrier()  # every thread has read the target's logit before one overwrites it
            for start in range(0, NUM_COLUMNS, BLOCK):
                offsets = start + columns
                x = tl.load(logits + offsets, mask=offsets < VOCAB_SIZE, other=float("-inf"))
                probability = tl.exp2(x.to(tl.float32) * log2_e - log2_total)
                tl.store(logits + offsets, probability.to(x.dtype), mask=offsets < NUM_COLUMNS)
            tl.debug_barrier()  # and the probability is there before the target's own is put right
            at_target = tl.exp2(at_target * log2_e - log2_total) - 1.0
            tl.store(logits + target, at_target.to(logits.dtype.element_ty), mask=exists)


def gelu(x: Tensor) -> Tensor:
    """The tanh GELU of a contiguous tensor."""
    y = torch.empty_like(x)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        _gelu[(triton.cdiv(x.numel(), 2048),)](x, y, x.numel(), BLOCK=2048)
    return y


def gelu_backward(x: Tensor, d_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The tanh GELU and its gradient by `x`, with that gradient's sum over the rows.

    Args:
        x: (n, F), contiguous.
        d_y: the gradient by the GELU, (n, F), contiguous.

    Returns:
        GELU(x) (n, F), the gradient by x (n, F), its sums (F,) in float32.
    """
    rows, columns = x.shape
    y, d_x = torch.empty_like(x), torch.empty_like(x)
    parts = triton.cdiv(rows, GELU_ROWS)
    sums = torch.empty(parts, columns, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        _gelu_backward[(triton.cdiv(columns, GELU_BLOCK[1]), parts)](
            x,
            d_y,
            y,
            d_x,
            sums,
            rows,
            columns,
            ROWS=GELU_ROWS,
            BLOCK_ROWS=GELU_BLOCK[0],
            BLOCK_COLUMNS=GELU_BLOCK[1],
            num_warps=8,
        )
    return y, d_x, sums.sum(0)


@triton.jit
def _logistic_argument(x):
    """The u in GELU(x) = x·logistic(u): tanh's GELU, for (1 + tanh(u/2))/2 is the logistic function of u."""
    return 1.5957691216057308 * x * (1.0 + 0.044715 * x * x)


@triton.jit
def _gelu(x, y, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + offsets, mask=offsets < size)
    wide = value.to(tl.float32)
    tl.store(y + offsets, (wide * tl.sigmoid(_logistic_argument(wide))).to(value.dtype), mask=offsets < size)


@triton.jit
def _gelu_backward(
    x,
    d_y,
    y,
    d_x,
    sums,
    num_rows,
    num_columns,
    ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    columns = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
    first = tl.program_id(1) * ROWS
    skipped = first.to(tl.int64) * num_columns
    x += skipped
    d_y += skipped
    y += skipped
    d_x += skipped
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], dtype=tl.float32)
    for start in tl.range(0, ROWS, BLOCK_ROWS, num_stages=3):
        rows = start + tl.arange(0, BLOCK_ROWS)[:, None]
        inside = (first + rows < num_rows) & (columns < num_columns)
        offsets = rows * num_columns + columns
        # Every value is read once: it need not push others out of the cache.
        narrow = tl.load(x + offsets, mask=inside, other=0.0, eviction_policy="evict_first")
        value = narrow.to(tl.float32)
        gradient = tl.load(d_y + offsets, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
        gate = tl.sigmoid(_logistic_argument(value))
        slope = 1.5957691216057308 + 0.21406445 * value * value  # of the argument: 3 · 0.044715 · 1.59576912
        gradient *= gate * (1.0 + value * (1.0 - gate) * slope)
        tl.store(y + offsets, (value * gate).to(narrow.dtype), mask=inside)
        tl.store(d_x + offsets, gradient.to(narrow.dtype), mask=inside)
        total += gradient
    part = tl.program_id(1) * num_columns + columns
    tl.store(sums + part, tl.sum(total, axis=0)[None, :], mask=columns < num_columns)
