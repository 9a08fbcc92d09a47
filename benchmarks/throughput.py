"""Training throughput: homebrew, nanoGPT, Hugging Face's Trainer, llm.c, and a bare loop around homebrew's model."""

from dataclasses import dataclass
from pathlib import Path

from command_line import run_script
from harness import DEVICE, Implementation, Report, RoundOptions
from implementations import bare_loop, hf_trainer, homebrew_trainer, llmc, model_config, nanogpt, random_ids

from homebrew import GPT, GPTConfig
from homebrew.errors import ConfigError


@dataclass
class Options(RoundOptions):
    """Measure training throughput with random tokens."""

    models: tuple[str, ...] = ("gpt2",)
    """Model presets, with changes if wanted: "gpt2:n_layer=4,n_head=4,n_embd=128,vocab_size=65"."""
    block_size: int = 1024
    """Tokens per sequence."""
    tokens: int = 524_288
    """Tokens per step."""
    micro_batch: int = 64
    """Micro-batch size of the alternatives. homebrew's Trainer chooses its own."""
    only: tuple[str, ...] = ("homebrew", "nanogpt", "nanogpt-no-bias", "hf", "hf-unpadded", "llmc")
    """Implementations to run. Also: "bare", a bare loop around homebrew's model, which shows the Trainer's overhead."""
    nanogpt: Path | None = None
    """Folder with a clone of nanoGPT. Default: skip nanoGPT."""
    llmc: Path | None = None
    """Folder with a built train_gpt2cu of llm.c. Default: skip llm.c."""
    llmc_flags: str = "-r 0"
    """Flags of llm.c. "-r 0" recomputes nothing, "-ge 2" fuses GELU."""


def main(options: Options) -> None:
    report = Report(options.json)
    for model in options.models:
        config = model_config(model, block_size=options.block_size)
        title = f"{model} on {DEVICE.type}: {options.tokens:,} tokens per step, sequences of {config.block_size}"
        flops = GPT(config).flops_per_token()
        report.measure(title, implementations(config, options), options, tokens=options.tokens, flops=flops)
    report.finish()


def implementations(config: GPTConfig, options: Options) -> list[Implementation]:
    """Return homebrew first, then the alternatives."""
    accumulation, rest = divmod(options.tokens, options.micro_batch * config.block_size)
    if not accumulation or rest:
        raise ConfigError(f"--tokens {options.tokens}: must be a multiple of --micro-batch × --block-size.")
    sizes = {"micro_batch": options.micro_batch, "accumulation": accumulation}
    ids = random_ids(max(8 * options.tokens, 200_000), config.vocab_size)
    padding = f"defaults, which pad the vocabulary to {config.padded_vocab_size:,}"
    unpadded = f"Hugging Face Trainer, vocabulary of {config.vocab_size:,}"
    every = {
        "homebrew": Implementation(
            "homebrew Trainer", lambda: homebrew_trainer(GPT(config), ids, global_batch_tokens=options.tokens), padding
        ),
        "bare": bare_loop(config, ids, **sizes),
        "nanogpt": nanogpt(options.nanogpt, config, ids, bias=True, **sizes),
        "nanogpt-no-bias": nanogpt(options.nanogpt, config, ids, bias=False, **sizes),
        "hf": hf_trainer("Hugging Face Trainer", config, ids, **sizes),
        "hf-unpadded": hf_trainer(unpadded, config, ids, pad_vocab=False, **sizes),
        "llmc": llmc(options.llmc, config, ids, flags=options.llmc_flags, **sizes),
    }
    if unknown := set(options.only) - every.keys():
        raise ConfigError(f"Unknown implementations: {', '.join(unknown)}. Use: {', '.join(every)}.")
    return [each for key, each in every.items() if key in options.only]


if __name__ == "__main__":
    run_script(main, Options)
