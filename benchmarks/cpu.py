"""Training rate of small models on a CPU: homebrew's Trainer, nanoGPT and a bare loop."""

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from harness import DEVICE, Implementation, Report, measure_interleaved, use_cpu_time
from implementations import bare_loop, homebrew_trainer, nanogpt_loop, random_ids

from homebrew import GPT, GPTConfig

CONFIGS = {
    # The preset with its default batch size, and the CPU settings in nanoGPT's README.
    "baby": (GPTConfig.preset("baby"), 16),
    "shakespeare_char": (GPTConfig(n_layer=4, n_head=4, n_embd=128, block_size=64, vocab_size=65), 12),
}


@dataclass
class Options:
    """Measure steps per second on a CPU with random tokens."""

    models: tuple[str, ...] = ("baby", "shakespeare_char")
    """Models to run."""
    nanogpt: Path | None = None
    """Folder with a clone of nanoGPT. Default: a rewrite of its model and loop."""
    rounds: int = 5
    """Number of rounds. Each implementation runs once per round."""
    steps: int = 20
    """Timed steps per implementation and round; ten times as many for shakespeare_char."""
    processor_time: bool = False
    """Measure CPU time of one thread instead of wall time, for a CPU that other processes use."""
    json: Path | None = None
    """JSON file for tables and raw times."""


def main(options: Options) -> None:
    if DEVICE.type != "cpu":
        raise SystemExit("Hide the GPU (CUDA_VISIBLE_DEVICES=) to time the CPU.")
    if options.processor_time:
        use_cpu_time()
    report = Report(options.json)
    for name in options.models:
        config, batch = CONFIGS[name]
        ids = random_ids(200_000, config.vocab_size)
        baseline = "nanoGPT" if options.nanogpt else "nanoGPT (rewritten)"
        implementations = [
            Implementation(
                "homebrew", lambda c=config, b=batch, i=ids: homebrew_trainer(GPT(c), i, micro_batch_size=b)
            ),
            Implementation(
                baseline, lambda c=config, b=batch, i=ids: nanogpt_loop(options.nanogpt, c, i, micro_batch=b)
            ),
            Implementation(
                "bare loop, float32",
                lambda c=config, b=batch, i=ids: bare_loop(
                    GPT(c), i, micro_batch=b, compile_model=False, autocast=False
                ),
            ),
        ]
        scale = 10 if name == "shakespeare_char" else 1
        measurements = measure_interleaved(
            implementations, rounds=options.rounds, steps=scale * options.steps, warmup=3
        )
        title = f"{name}: {batch} × {config.block_size} tokens per step"
        report.add_throughput(title, measurements, per_step=1, unit="steps/s")
    report.finish()


if __name__ == "__main__":
    torch.manual_seed(0)
    main(tyro.cli(Options))
