"""Tokens a second of GPT-2 small and medium: homebrew's Trainer against the loops and trainers people use."""

from dataclasses import dataclass
from pathlib import Path

import tyro
from alternating import DEVICE, Report, Side, alternate, matmul_peak
from sides import hf_model, hf_trainer, homebrew_trainer, llmc, nanogpt_loop, random_ids, seed_loop

from homebrew import GPT, GPTConfig


@dataclass
class Options:
    """Training speed at 524,288 tokens a step, with random tokens."""

    models: tuple[str, ...] = ("gpt2",)
    """Presets to run: gpt2, gpt2-medium, and so on."""
    tokens: int = 524_288
    """In a step."""
    micro_batch: int = 64
    """Sequences the other sides take at once; the seed's loop takes 8, homebrew's Trainer what it chooses itself."""
    without: tuple[str, ...] = ()
    """Sides to leave out: seed, nanogpt, hf."""
    nanogpt: Path | None = None
    """A folder with a copy of nanoGPT; our rewrite of its loop if not given."""
    llmc: Path | None = None
    """A folder in which llm.c's train_gpt2cu was built; left out if not given."""
    block_size: int = 1024
    """Tokens in a sequence."""
    rounds: int = 5
    """Stretches of each side."""
    steps: int = 5
    """Timed steps in a stretch."""
    json: Path | None = None
    """A file to write the figures to."""


def main(options: Options) -> None:
    report = Report(options.json)
    peak = matmul_peak()
    report.facts["matrix products"] = f"{peak / 1e12:.1f} TFLOP/s"
    for name in options.models:
        shape = GPTConfig.preset(name, block_size=options.block_size)
        measured = alternate(sides(shape, options), rounds=options.rounds, steps=options.steps)
        flops = GPT(shape).flops_per_token() * options.tokens
        title = f"{name} on {DEVICE.type}: {options.tokens:,} tokens a step, sequences of {shape.block_size}"
        report.add_rates(title, measured, per_step=options.tokens, flops_per_step=flops, peak=peak)
    report.finish()


def sides(shape: GPTConfig, options: Options) -> list[Side]:
    """Ours first, then the others."""
    block, batch = shape.block_size, options.micro_batch
    accumulation = options.tokens // (batch * block)
    ids = random_ids(8 * options.tokens, shape.vocab_size)
    theirs = "nanoGPT" if options.nanogpt else "nanoGPT (rewritten)"
    found = {
        "homebrew": Side(
            "homebrew Trainer", lambda: homebrew_trainer(GPT(shape), ids, global_batch_tokens=options.tokens)
        ),
        "nanogpt": Side(
            f"{theirs}, bias=True",
            lambda: nanogpt_loop(options.nanogpt, shape, ids, micro_batch=batch, accumulation=accumulation),
        ),
        "hf": Side(
            "Hugging Face Trainer",
            lambda: hf_trainer(hf_model(shape), ids, block, micro_batch=batch, accumulation=accumulation),
        ),
        "seed": Side(
            "the seed's loop",
            lambda: seed_loop(
                shape, ids, accumulation=options.tokens // (min(8, batch) * block), micro_batch=min(8, batch)
            ),
        ),
    }
    if options.llmc is not None:
        folder = options.llmc.resolve()
        found["llmc"] = Side("llm.c", lambda: llmc(folder, shape, ids, micro_batch=batch, accumulation=accumulation))
    return [side for key, side in found.items() if key not in options.without]


if __name__ == "__main__":
    main(tyro.cli(Options))
