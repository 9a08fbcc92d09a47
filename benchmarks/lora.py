"""LoRA fine-tuning of GPT-2: homebrew, and PEFT with Hugging Face's Trainer; full fine-tuning for comparison."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from harness import DEVICE, Implementation, Report, measure_interleaved
from implementations import describe_hf, hf_model, hf_trainer, homebrew_trainer, random_ids

from homebrew import GPT, GPTConfig, LoRAConfig, add_lora


@dataclass
class Options:
    """Measure tokens/s and peak memory with one micro-batch per step, random tokens and weights."""

    model: str = "gpt2"
    """Model preset."""
    block_size: int = 1024
    """Tokens per sequence."""
    micro_batch: int = 16
    """Sequences per step."""
    rank: int = 8
    """Rank of the adapters on c_attn and c_proj."""
    compile_modes: tuple[str, ...] = ("default", "reduce-overhead")
    """Values of torch_compile_mode for PEFT's rows; "reduce-overhead" uses CUDA graphs."""
    rounds: int = 5
    """Number of rounds. Each implementation runs once per round."""
    steps: int = 20
    """Timed steps per implementation and round."""
    json: Path | None = None
    """JSON file for tables and raw times."""


def main(options: Options) -> None:
    report = Report(options.json)
    config = GPTConfig.preset(options.model, block_size=options.block_size)
    tokens = options.micro_batch * config.block_size
    ids = random_ids(max(32 * tokens, 10_000), config.vocab_size)
    batch, block = options.micro_batch, config.block_size

    def lora_model() -> GPT:
        model = GPT(config)
        add_lora(model, LoRAConfig(rank=options.rank))
        return model

    def peft(compile_mode: str) -> Implementation:
        mode = {"torch_compile_mode": compile_mode} if DEVICE.type == "cuda" else {}
        return Implementation(
            "PEFT + Hugging Face Trainer" + (f", {compile_mode}" if compile_mode != "default" else ""),
            lambda: hf_trainer(peft_model(config, options), ids, block, micro_batch=batch, **mode),
            describe_hf(**mode),
        )

    implementations = [
        Implementation(
            "homebrew, LoRA", lambda: homebrew_trainer(lora_model(), ids, micro_batch_size=batch), "defaults"
        ),
        *(peft(mode) for mode in options.compile_modes),
        Implementation(
            "homebrew, full", lambda: homebrew_trainer(GPT(config), ids, micro_batch_size=batch), "defaults"
        ),
        Implementation(
            "Hugging Face Trainer, full",
            lambda: hf_trainer(hf_model(config), ids, block, micro_batch=batch),
            describe_hf(),
        ),
    ]
    measurements = measure_interleaved(implementations, rounds=options.rounds, steps=options.steps, warmup=3)
    title = f"{options.model} on {DEVICE.type}: {batch} × {block} tokens per step, rank {options.rank}"
    report.add_throughput(title, measurements, per_step=tokens)
    report.finish()


def peft_model(config: GPTConfig, options: Options) -> Any:
    """Return GPT-2 with the same adapter, built by PEFT."""
    import peft

    lora = LoRAConfig(rank=options.rank)
    peft_config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.scale * lora.rank,
        target_modules=list(lora.target_modules),
        lora_dropout=lora.dropout,
        fan_in_fan_out=True,
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(hf_model(config), peft_config)


if __name__ == "__main__":
    main(tyro.cli(Options))
