"""The head and its loss: homebrew's fused pass against PyTorch's cross entropy over all logits."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from alternating import DEVICE, GIB, Report, time_call, use_processor_time
from torch import Tensor
from torch.nn import functional as F

from homebrew.model.ops.chunked_loss import linear_cross_entropy

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass
class Options:
    """Forward and backward of head and loss, weights in float32, products in another dtype under autocast."""

    tokens: tuple[int, ...] = (4096, 16_384, 65_536) if DEVICE.type == "cuda" else (512, 2048)
    """In a micro-batch."""
    widths: tuple[int, ...] = (768, 1024) if DEVICE.type == "cuda" else (128,)
    """Of the hidden states."""
    vocab_size: int = 50_257
    """Ids."""
    dtypes: tuple[str, ...] = ("bfloat16",) if DEVICE.type == "cuda" else ("bfloat16", "float32")
    """Of the matrix products."""
    repeats: int = 10
    """Calls, of which the median counts."""
    processor_time: bool = False
    """One thread, and its own time instead of the wall's: for a CPU that others use meanwhile."""
    json: Path | None = None
    """A file to write the figures to."""


def main(options: Options) -> None:
    if options.processor_time:
        use_processor_time()
    report = Report(options.json)
    plain_compiled = torch.compile(plain, dynamic=False)
    rows = []
    for dtype in options.dtypes:
        for width in options.widths:
            for tokens in options.tokens:
                case = inputs(tokens, width, options.vocab_size)
                ways: dict[str, Callable[..., Tensor]] = {"fused": linear_cross_entropy, "plain": plain}
                if DEVICE.type == "cuda":
                    ways["plain, compiled"] = plain_compiled
                measured = {name: measure(way, case, DTYPES[dtype], options) for name, way in ways.items()}
                for name, (seconds, peak) in measured.items():
                    row = {"tokens": f"{tokens:,}", "width": str(width), "dtype": dtype, "head and loss": name}
                    row["ms"] = f"{1000 * seconds:.2f}"
                    row["fused is"] = f"{seconds / measured['fused'][0]:.2f} ×"
                    rows.append(row | ({"peak GiB": f"{peak / GIB:.2f}"} if DEVICE.type == "cuda" else {}))
    report.add(f"Head and loss over {options.vocab_size:,} ids, forward and backward, on {DEVICE.type}", rows)
    report.finish()


def inputs(tokens: int, width: int, vocab_size: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """Hidden states (1, n, C), the head's rows (padded V, C), targets (1, n), and V."""
    generator = torch.Generator().manual_seed(0)
    padded = -(-vocab_size // 128) * 128
    hidden = torch.randn(1, tokens, width, generator=generator).to(DEVICE)
    hidden = hidden.to(torch.bfloat16) if DEVICE.type == "cuda" else hidden
    weight = (0.02 * torch.randn(padded, width, generator=generator)).to(DEVICE)
    targets = torch.randint(vocab_size, (1, tokens), generator=generator).to(DEVICE)
    return hidden.requires_grad_(), weight.requires_grad_(), targets, vocab_size


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """All logits, then PyTorch's loss."""
    return F.cross_entropy(F.linear(hidden, weight)[0, :, :vocab_size], targets[0])


def measure(
    way: Callable[..., Tensor], case: tuple[Tensor, Tensor, Tensor, int], dtype: torch.dtype, options: Options
) -> tuple[float, int]:
    """Seconds of a forward and backward pass, and its peak memory above the inputs, in bytes."""

    def call() -> None:
        case[0].grad = case[1].grad = None
        with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
            loss = way(*case)
        loss.backward()  # type: ignore[no-untyped-call]

    if DEVICE.type != "cuda":
        return time_call(call, repeats=options.repeats, warmup=1), 0
    call()
    case[0].grad = case[1].grad = None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    peak = torch.cuda.max_memory_allocated() - before
    return time_call(call, repeats=options.repeats), peak


if __name__ == "__main__":
    main(tyro.cli(Options))
