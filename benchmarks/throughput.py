"""Training throughput: homebrew, nanoGPT, Hugging Face's Trainer, llm.c, and a bare loop around homebrew's model."""

from dataclasses import dataclass
from pathlib import Path

import tyro
from arguments import model_config
from harness import DEVICE, Implementation, Report, RunSteps, measure_interleaved, measure_matmul_flops, use_cpu_time
from implementations import (
    NANOGPT_SETTINGS,
    ON_GPU,
    adamw,
    describe_hf,
    device_batches,
    hf_model,
    hf_trainer,
    homebrew_trainer,
    llmc,
    nanogpt_loop,
    plain_loop,
    random_ids,
)

from homebrew import GPT, GPTConfig
from homebrew.distributed.precision import has_native_bf16


@dataclass
class Options:
    """Measure training throughput with random tokens."""

    models: tuple[str, ...] = ("gpt2",)
    """Model presets, with changes if wanted: "gpt2:n_layer=4,n_head=4,n_embd=128,vocab_size=65"."""
    tokens: int = 524_288
    """Tokens per step."""
    micro_batch: int = 64
    """Micro-batch size of the alternatives. homebrew's Trainer chooses its own."""
    only: tuple[str, ...] = ("homebrew", "nanogpt", "nanogpt-no-bias", "hf", "hf-unpadded", "llmc")
    """Implementations to run. Also: "bare", a bare loop around homebrew's model, which shows the Trainer's overhead."""
    without: tuple[str, ...] = ()
    """Implementations to skip."""
    nanogpt: Path | None = None
    """Folder with a clone of nanoGPT. Default: skip nanoGPT."""
    llmc: Path | None = None
    """Folder with a built train_gpt2cu of llm.c. Default: skip llm.c."""
    llmc_flags: str = "-r 0"
    """Flags of llm.c. "-r 0" recomputes nothing, "-ge 2" fuses GELU."""
    block_size: int = 1024
    """Tokens per sequence."""
    rounds: int = 5
    """Number of rounds. Each implementation runs once per round."""
    steps: int = 5
    """Timed steps per implementation and round."""
    warmup: int = 1
    """Steps before them that are not timed."""
    processor_time: bool = False
    """Measure CPU time of one thread instead of wall time, for a CPU that other processes use."""
    json: Path | None = None
    """JSON file for tables and raw times."""


def main(options: Options) -> None:
    if options.processor_time:
        use_cpu_time()
    report = Report(options.json)
    for model in options.models:
        measure(model_config(model, block_size=options.block_size), options, report, name=model)
    report.finish()


def measure(config: GPTConfig, options: Options, report: Report, *, name: str) -> None:
    """Add the table of one model to the report."""
    peak, flops = measure_matmul_flops(), GPT(config).flops_per_token() * options.tokens
    report.metadata["matrix products"] = f"{peak / 1e12:.2f} TFLOP/s"
    implementations = build_implementations(config, options)
    measurements = measure_interleaved(
        implementations, rounds=options.rounds, steps=options.steps, warmup=options.warmup
    )
    title = f"{name} on {DEVICE.type}: {options.tokens:,} tokens per step, sequences of {config.block_size}"
    report.add_throughput(title, measurements, per_step=options.tokens, flops_per_step=flops, peak=peak)


def build_implementations(config: GPTConfig, options: Options) -> list[Implementation]:
    """Return homebrew first, then the alternatives."""
    block, batch = config.block_size, options.micro_batch
    sizes = {"micro_batch": batch, "accumulation": options.tokens // (batch * block)}
    ids = random_ids(max(8 * options.tokens, 200_000), config.vocab_size)
    unpadded = f"of {config.vocab_size:,}"

    def bare_loop() -> RunSteps:
        model = GPT(config).to(DEVICE)
        return plain_loop(
            model,
            adamw(model),
            device_batches(ids, block, batch),
            accumulation=sizes["accumulation"],
            mode="reduce-overhead" if ON_GPU and sizes["accumulation"] == 1 else None,
            autocast=has_native_bf16(),
        )

    every = {
        "homebrew": Implementation(
            "homebrew Trainer",
            lambda: homebrew_trainer(GPT(config), ids, global_batch_tokens=options.tokens),
            f"defaults, with which it pads the vocabulary to {config.padded_vocab_size:,}",
        ),
        "bare": Implementation(
            "bare loop", bare_loop, "the same model, on batches that are on the device; it never reads the loss"
        ),
        "nanogpt": Implementation(
            "nanoGPT, bias=True", lambda: nanogpt_loop(options.nanogpt, config, ids, **sizes), NANOGPT_SETTINGS
        ),
        "nanogpt-no-bias": Implementation(
            "nanoGPT, bias=False",
            lambda: nanogpt_loop(options.nanogpt, config, ids, bias=False, **sizes),
            "the same without biases, its default, which is not GPT-2",
        ),
        "hf": Implementation(
            "Hugging Face Trainer", lambda: hf_trainer(hf_model(config), ids, block, **sizes), describe_hf()
        ),
        "hf-unpadded": Implementation(
            f"Hugging Face Trainer, vocabulary {unpadded}",
            lambda: hf_trainer(hf_model(config, pad_vocab=False), ids, block, **sizes),
            f"the same with a vocabulary {unpadded}",
        ),
        "llmc": Implementation(
            "llm.c",
            lambda: llmc(options.llmc, config, ids, flags=options.llmc_flags, **sizes),
            f"bfloat16, vocabulary padded to 50,304, {options.llmc_flags}",
        ),
    }
    return [implementation for key, implementation in every.items() if key in {*options.only} - {*options.without}]


if __name__ == "__main__":
    main(tyro.cli(Options))
