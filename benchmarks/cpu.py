"""Small models on this CPU: homebrew's Trainer against nanoGPT's train.py and a bare loop."""

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from alternating import DEVICE, Report, Side, alternate, use_processor_time
from sides import bare_loop, homebrew_trainer, nanogpt_loop, random_ids

from homebrew import GPT, GPTConfig

SHAPES = {
    # The preset at its usual batch, and the recipe nanoGPT's README gives for a computer without a GPU.
    "baby": (GPTConfig.preset("baby"), 16),
    "shakespeare_char": (GPTConfig(n_layer=4, n_head=4, n_embd=128, block_size=64, vocab_size=65), 12),
}


@dataclass
class Options:
    """Steps a second on a CPU, with random tokens."""

    models: tuple[str, ...] = ("baby", "shakespeare_char")
    """Which to run."""
    nanogpt: Path | None = None
    """A folder with a copy of nanoGPT; our rewrite of its loop if not given."""
    rounds: int = 5
    """Stretches of each side."""
    steps: int = 20
    """Timed steps in a stretch; ten times as many for shakespeare_char's small one."""
    processor_time: bool = False
    """One thread, and its own time instead of the wall's: for a CPU that others use meanwhile."""
    json: Path | None = None
    """A file to write the figures to."""


def main(options: Options) -> None:
    if DEVICE.type != "cpu":
        raise SystemExit("Hide the GPU (CUDA_VISIBLE_DEVICES=) to time the CPU.")
    if options.processor_time:
        use_processor_time()
    report = Report(options.json)
    for name in options.models:
        shape, batch = SHAPES[name]
        ids = random_ids(200_000, shape.vocab_size)
        theirs = "nanoGPT" if options.nanogpt else "nanoGPT (rewritten)"
        sides = [
            Side("homebrew", lambda s=shape, b=batch, i=ids: homebrew_trainer(GPT(s), i, micro_batch_size=b)),
            Side(theirs, lambda s=shape, b=batch, i=ids: nanogpt_loop(options.nanogpt, s, i, micro_batch=b)),
            Side(
                "bare loop, float32",
                lambda s=shape, b=batch, i=ids: bare_loop(
                    GPT(s), i, micro_batch=b, compile_model=False, autocast=False
                ),
            ),
        ]
        scale = 10 if name == "shakespeare_char" else 1
        measured = alternate(sides, rounds=options.rounds, steps=scale * options.steps, warmup=3)
        title = f"{name}: {batch} × {shape.block_size} tokens a step"
        report.add_rates(title, measured, per_step=1, unit="steps/s")
    report.finish()


if __name__ == "__main__":
    torch.manual_seed(0)
    main(tyro.cli(Options))
