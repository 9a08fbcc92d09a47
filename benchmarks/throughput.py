"""Training throughput of GPT-2: homebrew, nanoGPT, Hugging Face's Trainer, the original notebook's loop and llm.c."""

from dataclasses import dataclass
from pathlib import Path

import tyro
from harness import DEVICE, Implementation, Report, measure_interleaved, measure_matmul_flops
from implementations import (
    LLMC_FLAGS,
    NANOGPT_SETTINGS,
    describe_hf,
    hf_model,
    hf_trainer,
    homebrew_trainer,
    llmc,
    nanogpt_loop,
    notebook_loop,
    random_ids,
)

from homebrew import GPT, GPTConfig


@dataclass
class Options:
    """Measure training throughput at 524,288 tokens per step with random tokens."""

    models: tuple[str, ...] = ("gpt2",)
    """Model presets: gpt2, gpt2-medium, ..."""
    tokens: int = 524_288
    """Tokens per step."""
    micro_batch: int = 64
    """Micro-batch size of the alternatives. The notebook's loop uses 8, and homebrew chooses its own."""
    without: tuple[str, ...] = ()
    """Implementations to skip: nanogpt, nanogpt-no-bias, hf, hf-unpadded, seed (the notebook's loop)."""
    nanogpt: Path | None = None
    """Folder with a clone of nanoGPT. Default: a rewrite of its model and loop."""
    llmc: Path | None = None
    """Folder with a built train_gpt2cu of llm.c. Default: skip llm.c."""
    llmc_flags: str = LLMC_FLAGS
    """Flags of llm.c. "-r 0 -ge 2" also fuses GELU."""
    block_size: int = 1024
    """Tokens per sequence."""
    rounds: int = 5
    """Number of rounds. Each implementation runs once per round."""
    steps: int = 5
    """Timed steps per implementation and round."""
    json: Path | None = None
    """JSON file for tables and raw times."""


def main(options: Options) -> None:
    report = Report(options.json)
    peak = measure_matmul_flops()
    report.metadata["matrix products"] = f"{peak / 1e12:.1f} TFLOP/s"
    for name in options.models:
        config = GPTConfig.preset(name, block_size=options.block_size)
        measurements = measure_interleaved(
            build_implementations(config, options), rounds=options.rounds, steps=options.steps
        )
        flops = GPT(config).flops_per_token() * options.tokens
        title = f"{name} on {DEVICE.type}: {options.tokens:,} tokens per step, sequences of {config.block_size}"
        report.add_throughput(title, measurements, per_step=options.tokens, flops_per_step=flops, peak=peak)
    report.finish()


def build_implementations(config: GPTConfig, options: Options) -> list[Implementation]:
    """Return homebrew first, then the alternatives."""
    block, batch = config.block_size, options.micro_batch
    accumulation = options.tokens // (batch * block)
    ids = random_ids(8 * options.tokens, config.vocab_size)
    baseline = "nanoGPT" if options.nanogpt else "nanoGPT (rewritten)"
    sizes = {"micro_batch": batch, "accumulation": accumulation}
    unpadded = f"of {config.vocab_size:,}"
    all_implementations = {
        "homebrew": Implementation(
            "homebrew Trainer",
            lambda: homebrew_trainer(GPT(config), ids, global_batch_tokens=options.tokens),
            f"defaults, vocabulary padded to {config.padded_vocab_size:,} by itself",
        ),
        "nanogpt": Implementation(
            f"{baseline}, bias=True",
            lambda: nanogpt_loop(options.nanogpt, config, ids, **sizes),
            NANOGPT_SETTINGS,
        ),
        "nanogpt-no-bias": Implementation(
            f"{baseline}, bias=False",
            lambda: nanogpt_loop(options.nanogpt, config, ids, bias=False, **sizes),
            f"{NANOGPT_SETTINGS}; no biases, its default, which is not GPT-2",
        ),
        "hf": Implementation(
            "Hugging Face Trainer", lambda: hf_trainer(hf_model(config), ids, block, **sizes), describe_hf()
        ),
        "hf-unpadded": Implementation(
            f"Hugging Face Trainer, vocabulary {unpadded}",
            lambda: hf_trainer(hf_model(config, pad_vocab=False), ids, block, **sizes),
            describe_hf(unpadded),
        ),
        "seed": Implementation(
            "original notebook",
            lambda: notebook_loop(
                config, ids, accumulation=options.tokens // (min(8, batch) * block), micro_batch=min(8, batch)
            ),
        ),
    }
    if options.llmc is not None:
        folder = options.llmc.resolve()
        all_implementations["llmc"] = Implementation(
            "llm.c",
            lambda: llmc(folder, config, ids, flags=options.llmc_flags, **sizes),
            f"bfloat16, cuDNN attention if built with it, vocabulary of 50,304, {options.llmc_flags}",
        )
    if options.nanogpt is None:
        all_implementations.pop("nanogpt-no-bias")  # the rewrite has biases
    return [implementation for key, implementation in all_implementations.items() if key not in options.without]


if __name__ == "__main__":
    main(tyro.cli(Options))
