"""Fine-tuning GPT-2 with adapters of rank 8: homebrew against peft under Hugging Face's Trainer, and full training."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from alternating import DEVICE, Report, Side, alternate
from sides import hf_model, hf_trainer, homebrew_trainer, random_ids

from homebrew import GPT, GPTConfig
from homebrew.model.lora import LoRAConfig, add_lora


@dataclass
class Options:
    """Tokens a second and peak memory, one micro-batch a step, random tokens and weights."""

    model: str = "gpt2"
    """A preset."""
    block_size: int = 1024
    """Tokens in a sequence."""
    micro_batch: int = 16
    """Sequences a step."""
    rank: int = 8
    """Of the adapters on attention's and the MLP's matrices named c_attn and c_proj."""
    rounds: int = 5
    """Stretches of each side."""
    steps: int = 20
    """Timed steps in a stretch."""
    json: Path | None = None
    """A file to write the figures to."""


def main(options: Options) -> None:
    report = Report(options.json)
    shape = GPTConfig.preset(options.model, block_size=options.block_size)
    tokens = options.micro_batch * shape.block_size
    ids = random_ids(max(32 * tokens, 10_000), shape.vocab_size)
    batch, block = options.micro_batch, shape.block_size

    def adapted() -> GPT:
        model = GPT(shape)
        add_lora(model, LoRAConfig(rank=options.rank))
        return model

    sides = [
        Side("homebrew, LoRA", lambda: homebrew_trainer(adapted(), ids, micro_batch_size=batch)),
        Side(
            "peft + Hugging Face Trainer", lambda: hf_trainer(peft_model(shape, options), ids, block, micro_batch=batch)
        ),
        Side("homebrew, full", lambda: homebrew_trainer(GPT(shape), ids, micro_batch_size=batch)),
        Side("Hugging Face Trainer, full", lambda: hf_trainer(hf_model(shape), ids, block, micro_batch=batch)),
    ]
    measured = alternate(sides, rounds=options.rounds, steps=options.steps, warmup=3)
    title = f"{options.model} on {DEVICE.type}: {batch} × {block} tokens a step, rank {options.rank}"
    report.add_rates(title, measured, per_step=tokens)
    report.finish()


def peft_model(shape: GPTConfig, options: Options) -> Any:
    """The same adapter as ours, by peft."""
    import peft

    ours = LoRAConfig(rank=options.rank)
    config = peft.LoraConfig(
        r=ours.rank,
        lora_alpha=ours.scale * ours.rank,
        target_modules=list(ours.target_modules),
        lora_dropout=ours.dropout,
        fan_in_fan_out=True,
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(hf_model(shape), config)


if __name__ == "__main__":
    main(tyro.cli(Options))
