"""Measure what each of homebrew's optimizations contributes.

python benchmarks/ablation.py            # homebrew's Trainer, with one optimization switched off at a time
python benchmarks/ablation.py --ladder   # a plain float32 loop, with one optimization added at a time
"""

import gc
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from command_line import run_script
from harness import DEVICE, ON_GPU, Implementation, Report, RoundOptions, RunSteps, StepTimer
from implementations import adamw, device_batches, homebrew_trainer, plain_loop, random_ids
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend

from homebrew import GPT, GPTConfig


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, *, dropout: float, training: bool) -> Tensor:
    """Attention that writes the scores to memory. Queries, keys, values and result are (B, nh, T, hs)."""
    scores = q @ k.mT * k.shape[-1] ** -0.5  # (B, nh, T, T)
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    weights = scores.masked_fill(future, -torch.inf).softmax(-1).to(v.dtype)
    return F.dropout(weights, dropout, training) @ v


def plain_loss(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Head and loss with the logits of all tokens in memory."""
    logits = F.linear(hidden, weight)[..., :vocab_size]
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


OPTIMIZATIONS: dict[str, dict[str, Any]] = {
    # What replaces each optimization: by name in homebrew, or as a field of TrainerConfig.
    "compile": {"compile": False},
    "flash attention": {
        "homebrew.model.ops.attention.causal_attention": explicit_attention,
        "homebrew.model.ops.attention.uses_cudnn": lambda _: False,
    },
    "padded vocabulary": {
        "homebrew.model.gpt_config.GPTConfig.padded_vocab_size": property(lambda config: config.vocab_size)
    },
    "bfloat16 residual": {"homebrew.model.transformer.compute_dtype": lambda x: x.dtype},
    "fused head and loss": {"homebrew.model.gpt.linear_cross_entropy": plain_loss},
    "Triton loss kernel": {"homebrew.model.ops.chunked_loss.uses_triton": lambda _: False},
    "GELU in matrix products": {"homebrew.model.ops.mlp.is_tunable": lambda *_: False},
    "timed matrix products": {
        f"homebrew.model.ops.{module}.is_tunable": lambda *_: False for module in ("linear", "matmul", "mlp")
    },
    "packed gradients": {"homebrew.model.ops.attention.uses_cudnn": lambda _: False},
    "cuDNN attention": {
        "homebrew.model.ops.attention.TRAINING_ATTENTION": [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH],
        "homebrew.model.ops.attention.uses_cudnn": lambda _: False,
    },
    "CUDA graphs": {"homebrew.training.compile.LAUNCH_BOUND_FLOPS": 0.0},
}
KERNELS = ("cuDNN attention", "bfloat16 residual", "fused head and loss", "timed matrix products")
"""Without these, the model is GPT-2 in plain PyTorch. Under autocast its residual stream and loss are float32."""
_PARTS = ("GELU in matrix products", "packed gradients")  # of timed matrix products and cuDNN attention
RUNGS = (
    *("float32", "TF32", "bfloat16", "compile", "flash attention", "padded vocabulary", "fused AdamW"),
    *("bfloat16 residual", "fused head and loss", "micro-batch 64", "cuDNN attention", "timed matrix products"),
)
GPU_RUNGS = {"TF32", "micro-batch 64", "cuDNN attention", "timed matrix products"}


@dataclass
class Options(RoundOptions):
    """Measure tokens/s and peak memory without each optimization."""

    without: tuple[str, ...] = (*KERNELS, *_PARTS, "Triton loss kernel", "padded vocabulary")
    """Optimizations to switch off, one per row. Also: "flash attention", "compile", "CUDA graphs"."""
    ladder: bool = False
    """Instead, add one optimization at a time to a plain loop with micro-batches of 8, and time 7 × `steps`."""
    model: str = "gpt2" if ON_GPU else "baby"
    """Model preset."""
    block_size: int = 1024 if ON_GPU else 128
    """Tokens per sequence."""
    tokens: int = 524_288 if ON_GPU else 1_024
    """Tokens per step."""
    micro_batch: int = 64 if ON_GPU else 8
    """Micro-batch size of all rows."""
    rounds: int = 3
    steps: int = 3


@contextmanager
def switched_off(optimizations: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Context manager that disables some optimizations: it replaces code, and yields fields for TrainerConfig."""
    replacements: dict[str, Any] = {}
    for optimization in optimizations:
        replacements |= OPTIMIZATIONS[optimization]
    with ExitStack() as stack:
        for name, replacement in replacements.items():
            if "." in name:
                stack.enter_context(patch(name, replacement))
        yield {name: value for name, value in replacements.items() if "." not in name}


def trainer_without(optimizations: Iterable[str], config: GPTConfig, ids: Tensor, **settings: Any) -> RunSteps:
    """Build homebrew's Trainer without some optimizations."""
    optimizations = tuple(optimizations)
    with switched_off(optimizations) as fields:
        run = homebrew_trainer(GPT(config), ids, **settings, **fields)

    def run_steps(timer: StepTimer) -> None:
        with switched_off(optimizations):  # the first steps compile
            run(timer)

    return run_steps


def ablate(options: Options, config: GPTConfig, report: Report) -> None:
    """Measure the Trainer, the Trainer without each optimization, and without all kernels."""
    ids = random_ids(8 * options.tokens, config.vocab_size)
    settings = {"global_batch_tokens": options.tokens, "micro_batch_size": options.micro_batch}
    rows = {"homebrew Trainer": ()} | {f"without {name}": (name,) for name in options.without}
    implementations = [
        Implementation(name, lambda off=off: trainer_without(off, config, ids, **settings))
        for name, off in (rows | {"without all kernels": KERNELS}).items()
    ]
    report.metadata["all kernels"] = ", ".join(KERNELS)
    title = f"{options.model} on {DEVICE.type}: {options.tokens:,} tokens per step, micro-batch {options.micro_batch}"
    flops = GPT(config).flops_per_token()
    report.measure(title, implementations, options, tokens=options.tokens, flops=flops)


def climb(options: Options, config: GPTConfig, report: Report) -> None:
    """Measure a plain loop, and add one optimization at a time. Each step is one micro-batch."""
    rows: list[dict[str, str]] = []
    throughputs: list[float] = []
    enabled = set[str]()
    for rung in (rung for rung in RUNGS if ON_GPU or rung not in GPU_RUNGS):
        enabled.add(rung)
        batch = 64 if "micro-batch 64" in enabled else 8
        timer = StepTimer(3, 7 * options.steps)
        try:
            with switched_off((OPTIMIZATIONS.keys() & RUNGS) - enabled):
                ladder_loop(config, enabled, batch)(timer)
        except torch.OutOfMemoryError:
            print(f"{rung}: does not fit on this GPU", file=sys.stderr)
            enabled.remove(rung)
            continue
        throughputs.append(batch * config.block_size / timer.seconds)
        row = {"optimization": rung, "tokens/s": f"{throughputs[-1]:,.0f}", "ms/step": f"{1000 * timer.seconds:.1f}"}
        for name, reference in (("gain", throughputs[-2:][0]), ("total", throughputs[0])):
            row[name] = f"{throughputs[-1] / reference:.2f} ×"
        rows.append(row)
        print(f"{rung}: {row['tokens/s']} tokens/s", file=sys.stderr)
    report.add(f"{options.model} on {DEVICE.type}, sequences of {config.block_size}", rows)


def ladder_loop(config: GPTConfig, enabled: set[str], micro_batch: int) -> RunSteps:
    """Build a plain loop that reads the loss of every step."""
    gc.collect()  # frees the previous model
    torch._dynamo.reset()
    torch.set_float32_matmul_precision("high" if "TF32" in enabled else "highest")
    model = GPT(config).to(DEVICE)
    optimizer = adamw(model, fused="fused AdamW" in enabled)
    batches = device_batches(random_ids(2**18, config.vocab_size), config.block_size, micro_batch)
    settings = {"compile_model": "compile" in enabled, "autocast": "bfloat16" in enabled}
    return plain_loop(model, optimizer, batches, **settings, read_loss_every=1)


def main(options: Options) -> None:
    if unknown := set(options.without) - OPTIMIZATIONS.keys():
        raise SystemExit(f"Unknown optimizations: {', '.join(unknown)}. Use: {', '.join(OPTIMIZATIONS)}.")
    report = Report(options.json)
    config = GPTConfig.preset(options.model, block_size=options.block_size)
    (climb if options.ladder else ablate)(options, config, report)
    report.finish()


if __name__ == "__main__":
    run_script(main, Options)
