"""LoRA fine-tuning of GPT-2: homebrew, and PEFT with Hugging Face's Trainer; full fine-tuning for comparison."""

from dataclasses import dataclass
from typing import Any

from command_line import run_script
from harness import DEVICE, ON_GPU, Implementation, Report, RoundOptions, RunSteps
from implementations import hf_trainer, homebrew_trainer, random_ids

from homebrew import GPT, GPTConfig, LoRAConfig, add_lora

LORA = LoRAConfig(rank=8)
"""The adapter of all rows, on c_attn and c_proj."""


@dataclass
class Options(RoundOptions):
    """Measure tokens/s and peak memory with one micro-batch per step, random tokens and weights."""

    model: str = "gpt2"
    """Model preset."""
    block_size: int = 1024
    """Tokens per sequence."""
    micro_batch: int = 16
    """Sequences per step."""
    steps: int = 20
    warmup: int = 3


def main(options: Options) -> None:
    report = Report(options.json)
    config = GPTConfig.preset(options.model, block_size=options.block_size)
    batch, block = options.micro_batch, config.block_size
    ids = random_ids(max(32 * batch * block, 10_000), config.vocab_size)

    def homebrew(lora: LoRAConfig | None) -> RunSteps:
        model = GPT(config)
        if lora is not None:
            add_lora(model, lora)
        return homebrew_trainer(model, ids, micro_batch_size=batch)

    name = "PEFT + Hugging Face Trainer"
    graphs = {"torch_compile_mode": "reduce-overhead"} if ON_GPU else {}  # uses CUDA graphs
    implementations = [
        Implementation("homebrew, LoRA", lambda: homebrew(LORA), "defaults"),
        hf_trainer(name, config, ids, micro_batch=batch, adapt=add_peft),
        hf_trainer(f"{name}, reduce-overhead", config, ids, micro_batch=batch, adapt=add_peft, **graphs),
        Implementation("homebrew, full", lambda: homebrew(None), "defaults"),
        hf_trainer("Hugging Face Trainer, full", config, ids, micro_batch=batch),
    ]
    title = f"{options.model} on {DEVICE.type}: {batch} × {block} tokens per step, rank {LORA.rank}"
    report.measure(title, implementations, options, tokens=batch * block)
    report.finish()


def add_peft(model: Any) -> Any:
    """Add the same adapter with PEFT."""
    import peft

    peft_config = peft.LoraConfig(
        r=LORA.rank,
        lora_alpha=LORA.scale * LORA.rank,
        target_modules=list(LORA.target_modules),
        lora_dropout=LORA.dropout,
        fan_in_fan_out=True,
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(model, peft_config)


if __name__ == "__main__":
    run_script(main, Options)
