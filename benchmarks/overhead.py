"""What the Trainer costs: its step rate against a hand-written loop over the same compiled model."""

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from alternating import DEVICE, Report, Side, alternate, use_processor_time
from sides import bare_loop, homebrew_trainer, random_ids

from homebrew import GPT, GPTConfig
from homebrew.distributed.accelerator import build_accelerator

CASES = {
    # shape, sequences at once, micro-batches in a step, steps that take about three seconds
    "large": (GPTConfig.preset("gpt2"), 64, 8, 3),
    "small": (GPTConfig(n_layer=6, n_head=6, n_embd=384, block_size=256, vocab_size=65), 64, 1, 500),
    "baby": (GPTConfig.preset("baby"), 16, 1, 6),
    "tiny": (GPTConfig(n_layer=4, n_head=4, n_embd=128, block_size=64, vocab_size=65), 12, 1, 120),
}


@dataclass
class Options:
    """Steps a second of the Trainer and of a bare loop."""

    cases: tuple[str, ...] = ("large", "small") if DEVICE.type == "cuda" else ("baby", "tiny")
    """Which of large, small (a GPU's), baby and tiny (a CPU's)."""
    rounds: int = 7
    """Stretches of each side."""
    steps: int | None = None
    """Timed steps in a stretch; about three seconds' if not given."""
    processor_time: bool = False
    """One thread, and its own time instead of the wall's: for a CPU that others use meanwhile."""
    json: Path | None = None
    """A file to write the figures to."""


def main(options: Options) -> None:
    if options.processor_time:
        use_processor_time()
    report = Report(options.json)
    on_gpu = DEVICE.type == "cuda"
    autocast = build_accelerator().mixed_precision == "bf16"
    for case in options.cases:
        torch._dynamo.reset()  # after another case's it would compile for shapes that vary
        shape, batch, accumulation, usual_steps = CASES[case]
        tokens = batch * accumulation * shape.block_size
        ids = random_ids(max(4 * tokens, 200_000), shape.vocab_size)
        mode = "reduce-overhead" if on_gpu and case != "large" else None
        sides = [
            Side(
                "homebrew Trainer",
                lambda s=shape, i=ids, b=batch, t=tokens: homebrew_trainer(
                    GPT(s), i, micro_batch_size=b, global_batch_tokens=t
                ),
            ),
            Side(
                "bare loop",
                lambda s=shape, i=ids, b=batch, a=accumulation, m=mode: bare_loop(
                    GPT(s), i, micro_batch=b, accumulation=a, compile_model=on_gpu, autocast=autocast, mode=m
                ),
            ),
        ]
        measured = alternate(sides, rounds=options.rounds, steps=options.steps or usual_steps, warmup=3)
        title = f"{case} on {DEVICE.type}: {shape.n_layer} layers, {shape.n_embd} wide, {tokens:,} tokens a step"
        report.add_rates(title, measured, per_step=1, unit="steps/s")
    report.finish()


if __name__ == "__main__":
    main(tyro.cli(Options))
