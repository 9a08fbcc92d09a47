"""Triton kernels for operations limited by memory bandwidth: the head's cross-entropy and the MLP's GELU.

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

GELU_BLOCK = (4, 1024)
"""Rows and columns per program of `gelu`."""

GELU_BACKWARD_BLOCK = (16, 128)
"""Rows and columns per block of `gelu_backward`."""

GELU_ROWS = 256
"""Number of rows that one program of `gelu_backward` processes and sums by column."""


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


def gelu(x: Tensor, bias: Tensor) -> Tensor:
    """Compute the tanh GELU of x + bias.

    Args:
        x: Matrix, (n, F), contiguous.
        bias: Vector to add to each row, (F,).
    """
    rows, columns = x.shape
    y = torch.empty_like(x)
    programs = triton.cdiv(rows, GELU_BLOCK[0]) * triton.cdiv(columns, GELU_BLOCK[1])
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        _gelu_kernel[(programs,)](x, bias, y, rows, columns, BLOCK_ROWS=GELU_BLOCK[0], BLOCK_COLUMNS=GELU_BLOCK[1])
    return y


def gelu_backward(x: Tensor, bias: Tensor, d_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the tanh GELU of x + bias, the gradient for `x`, and the sum of this gradient over the rows.

    Args:
        x: Matrix, (n, F), contiguous.
        bias: Vector to add to each row, (F,).
        d_y: Gradient for the GELU's output, (n, F), contiguous.

    Returns:
        GELU(x + bias), (n, F), the gradient for x, (n, F), and its column sums, (F,), float32, which are the gradient
        for the bias.
    """
    rows, columns = x.shape
    y, d_x = torch.empty_like(x), torch.empty_like(x)
    num_parts = triton.cdiv(rows, GELU_ROWS)
    sums = torch.empty(num_parts, columns, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        _gelu_backward_kernel[(triton.cdiv(columns, GELU_BACKWARD_BLOCK[1]), num_parts)](
            x,
            bias,
            d_y,
            y,
            d_x,
            sums,
            rows,
            columns,
            ROWS=GELU_ROWS,
            BLOCK_ROWS=GELU_BACKWARD_BLOCK[0],
            BLOCK_COLUMNS=GELU_BACKWARD_BLOCK[1],
            num_warps=8,
        )
    return y, d_x, sums.sum(0)


@triton.jit
def _sigmoid_argument(x):
    """Return u in GELU(x) = x·sigmoid(u). This is the tanh GELU, since (1 + tanh(u/2)) / 2 = sigmoid(u)."""
    return 1.5957691216057308 * x * (1.0 + 0.044715 * x * x)


@triton.jit
def _gelu_kernel(x, bias, y, num_rows, num_columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    blocks_per_row = tl.cdiv(num_columns, BLOCK_COLUMNS)
    columns = (tl.program_id(0) % blocks_per_row) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
    first_row = (tl.program_id(0) // blocks_per_row) * BLOCK_ROWS
    rows = tl.arange(0, BLOCK_ROWS)[:, None]
    inside = (first_row + rows < num_rows) & (columns < num_columns)
    offset = first_row.to(tl.int64) * num_columns
    x += offset
    y += offset
    offsets = rows * num_columns + columns
    shift = tl.load(bias + columns, mask=columns < num_columns).to(tl.float32)  # once for all rows
    # As in the backward kernel, x is read only once and should not evict y, which the next product reads.
    loaded = tl.load(x + offsets, mask=inside, eviction_policy="evict_first")
    value = loaded.to(tl.float32) + shift
    tl.store(y + offsets, (value * tl.sigmoid(_sigmoid_argument(value))).to(loaded.dtype), mask=inside)


@triton.jit
def _gelu_backward_kernel(
    x,
    bias,
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
    first_row = tl.program_id(1) * ROWS
    offset = first_row.to(tl.int64) * num_columns
    x += offset
    d_y += offset
    y += offset
    d_x += offset
    shift = tl.load(bias + columns, mask=columns < num_columns).to(tl.float32)
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], dtype=tl.float32)
    for start in tl.range(0, ROWS, BLOCK_ROWS, num_stages=3):
        rows = start + tl.arange(0, BLOCK_ROWS)[:, None]
        inside = (first_row + rows < num_rows) & (columns < num_columns)
        offsets = rows * num_columns + columns
        # Every value is read only once and should not evict other data from the cache.
        loaded = tl.load(x + offsets, mask=inside, other=0.0, eviction_policy="evict_first")
        value = loaded.to(tl.float32) + shift
        gradient = tl.load(d_y + offsets, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
        gate = tl.sigmoid(_sigmoid_argument(value))
        slope = 1.5957691216057308 + 0.21406445 * value * value  # the argument's derivative
        gradient *= gate * (1.0 + value * (1.0 - gate) * slope)
        tl.store(y + offsets, (value * gate).to(loaded.dtype), mask=inside)
        tl.store(d_x + offsets, gradient.to(loaded.dtype), mask=inside)
        total += gradient
    part = tl.program_id(1) * num_columns + columns
    tl.store(sums + part, tl.sum(total, axis=0)[None, :], mask=columns < num_columns)
