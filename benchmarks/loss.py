"""Output head and loss: homebrew's fused implementation, and PyTorch's cross entropy over all logits."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from harness import DEVICE, GIB, Report, time_call, use_cpu_time
from torch import Tensor
from torch.nn import functional as F

from homebrew.model.ops.chunked_loss import linear_cross_entropy

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass
class Options:
    """Measure forward and backward with float32 weights and matrix products in another dtype (autocast)."""

    tokens: tuple[int, ...] = (4096, 16_384, 65_536) if DEVICE.type == "cuda" else (512, 2048)
    """Tokens per micro-batch."""
    widths: tuple[int, ...] = (768, 1024) if DEVICE.type == "cuda" else (128,)
    """Widths of the hidden states."""
    vocab_size: int = 50_257
    """Size of the vocabulary."""
    dtypes: tuple[str, ...] = ("bfloat16",) if DEVICE.type == "cuda" else ("bfloat16", "float32")
    """Dtypes of the matrix products."""
    repeats: int = 10
    """Number of calls. The median is reported."""
    processor_time: bool = False
    """Measure CPU time of one thread instead of wall time, for a CPU that other processes use."""
    json: Path | None = None
    """JSON file for tables and raw times."""


def main(options: Options) -> None:
    if options.processor_time:
        use_cpu_time()
    report = Report(options.json)
    plain_compiled = torch.compile(plain, dynamic=False)
    rows = []
    for dtype in options.dtypes:
        for width in options.widths:
            for tokens in options.tokens:
                inputs = make_inputs(tokens, width, options.vocab_size)
                implementations: dict[str, Callable[..., Tensor]] = {"fused": linear_cross_entropy, "plain": plain}
                if DEVICE.type == "cuda":
                    implementations["plain, compiled"] = plain_compiled
                measurements = {
                    name: measure(implementation, inputs, DTYPES[dtype], options)
                    for name, implementation in implementations.items()
                }
                for name, (seconds, peak) in measurements.items():
                    row = {"tokens": f"{tokens:,}", "width": str(width), "dtype": dtype, "head and loss": name}
                    row["ms"] = f"{1000 * seconds:.2f}"
                    row["speedup of fused"] = f"{seconds / measurements['fused'][0]:.2f} ×"
                    rows.append(row | ({"peak GiB": f"{peak / GIB:.2f}"} if DEVICE.type == "cuda" else {}))
    report.add(f"Head and loss over {options.vocab_size:,} tokens, forward and backward, on {DEVICE.type}", rows)
    report.finish()


def make_inputs(tokens: int, width: int, vocab_size: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """Return hidden states (1, n, C), head weights (padded V, C), targets (1, n) and V."""
    generator = torch.Generator().manual_seed(0)
    padded = -(-vocab_size // 128) * 128
    hidden = torch.randn(1, tokens, width, generator=generator).to(DEVICE)
    hidden = hidden.to(torch.bfloat16) if DEVICE.type == "cuda" else hidden
    weight = (0.02 * torch.randn(padded, width, generator=generator)).to(DEVICE)
    targets = torch.randint(vocab_size, (1, tokens), generator=generator).to(DEVICE)
    return hidden.requires_grad_(), weight.requires_grad_(), targets, vocab_size


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Compute all logits, then PyTorch's loss."""
    return F.cross_entropy(F.linear(hidden, weight)[0, :, :vocab_size], targets[0])


def measure(
    implementation: Callable[..., Tensor],
    inputs: tuple[Tensor, Tensor, Tensor, int],
    dtype: torch.dtype,
    options: Options,
) -> tuple[float, int]:
    """Return the seconds of a forward and backward pass, and its peak memory without the inputs in bytes."""

    def call() -> None:
        inputs[0].grad = inputs[1].grad = None
        with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
            loss = implementation(*inputs)
        loss.backward()  # type: ignore[no-untyped-call]

    if DEVICE.type != "cuda":
        return time_call(call, repeats=options.repeats, warmup=1), 0
    call()
    inputs[0].grad = inputs[1].grad = None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    peak = torch.cuda.max_memory_allocated() - before
    return time_call(call, repeats=options.repeats), peak


if __name__ == "__main__":
    main(tyro.cli(Options))
