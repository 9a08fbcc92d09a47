"""Overhead of the Trainer: its step rate, and that of a bare loop over the same compiled model."""

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from harness import DEVICE, Implementation, Report, measure_interleaved, use_cpu_time
from implementations import bare_loop, homebrew_trainer, random_ids

from homebrew import GPT, GPTConfig
from homebrew.distributed.accelerator import build_accelerator

CASES = {
    # model, micro-batch size, micro-batches per step, steps that take about three seconds
    "large": (GPTConfig.preset("gpt2"), 64, 8, 3),
    "small": (GPTConfig(n_layer=6, n_head=6, n_embd=384, block_size=256, vocab_size=65), 64, 1, 500),
    "baby": (GPTConfig.preset("baby"), 16, 1, 6),
    "tiny": (GPTConfig(n_layer=4, n_head=4, n_embd=128, block_size=64, vocab_size=65), 12, 1, 120),
}


@dataclass
class Options:
    """Measure steps per second of the Trainer and of a bare loop."""

    cases: tuple[str, ...] = ("large", "small") if DEVICE.type == "cuda" else ("baby", "tiny")
    """Cases to run: large and small (for a GPU), baby and tiny (for a CPU)."""
    rounds: int = 7
    """Number of rounds. Each implementation runs once per round."""
    steps: int | None = None
    """Timed steps per implementation and round. Default: about three seconds."""
    processor_time: bool = False
    """Measure CPU time of one thread instead of wall time, for a CPU that other processes use."""
    json: Path | None = None
    """JSON file for tables and raw times."""


def main(options: Options) -> None:
    if options.processor_time:
        use_cpu_time()
    report = Report(options.json)
    on_gpu = DEVICE.type == "cuda"
    autocast = build_accelerator().mixed_precision == "bf16"
    for case in options.cases:
        torch._dynamo.reset()  # otherwise the second case compiles with dynamic shapes
        config, batch, accumulation, default_steps = CASES[case]
        tokens = batch * accumulation * config.block_size
        ids = random_ids(max(4 * tokens, 200_000), config.vocab_size)
        mode = "reduce-overhead" if on_gpu and case != "large" else None
        implementations = [
            Implementation(
                "homebrew Trainer",
                lambda c=config, i=ids, b=batch, t=tokens: homebrew_trainer(
                    GPT(c), i, micro_batch_size=b, global_batch_tokens=t
                ),
            ),
            Implementation(
                "bare loop",
                lambda c=config, i=ids, b=batch, a=accumulation, m=mode: bare_loop(
                    GPT(c), i, micro_batch=b, accumulation=a, compile_model=on_gpu, autocast=autocast, mode=m
                ),
            ),
        ]
        measurements = measure_interleaved(
            implementations, rounds=options.rounds, steps=options.steps or default_steps, warmup=3
        )
        title = f"{case} on {DEVICE.type}: {config.n_layer} layers, {config.n_embd} wide, {tokens:,} tokens per step"
        report.add_throughput(title, measurements, per_step=1, unit="steps/s")
    report.finish()


if __name__ == "__main__":
    main(tyro.cli(Options))
