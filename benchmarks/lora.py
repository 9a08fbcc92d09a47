"""LoRA fine-tuning of GPT-2: homebrew, and PEFT with Hugging Face's Trainer; full fine-tuning for comparison."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from harness import DEVICE, ON_GPU, Implementation, Report, RoundOptions, RunSteps
from implementations import hf_trainer, homebrew_trainer, random_ids
from run_script import run_script

from homebrew import GPT, GPTConfig, LoRAConfig, add_lora


@dataclass
class Options(RoundOptions):
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
    steps: int = 20
    warmup: int = 3


def main(options: Options) -> None:
    report = Report(options.json)
    config = GPTConfig.preset(options.model, block_size=options.block_size)
    batch, block = options.micro_batch, config.block_size
    ids = random_ids(max(32 * batch * block, 10_000), config.vocab_size)

    def homebrew(name: str, lora: LoRAConfig | None) -> Implementation:
        def build() -> RunSteps:
            model = GPT(config)
            if lora is not None:
                add_lora(model, lora)
            return homebrew_trainer(model, ids, micro_batch_size=batch)

        return Implementation(name, build, "defaults")

    def peft(mode: str) -> Implementation:
        name = "PEFT + Hugging Face Trainer" + (f", {mode}" if mode != "default" else "")
        settings = {"torch_compile_mode": mode} if ON_GPU else {}
        return hf_trainer(name, config, ids, micro_batch=batch, adapt=partial(add_peft, options.rank), **settings)

    implementations = [
        homebrew("homebrew, LoRA", LoRAConfig(rank=options.rank)),
        *(peft(mode) for mode in options.compile_modes),
        homebrew("homebrew, full", None),
        hf_trainer("Hugging Face Trainer, full", config, ids, micro_batch=batch),
    ]
    title = f"{options.model} on {DEVICE.type}: {batch} × {block} tokens per step, rank {options.rank}"
    report.measure(title, implementations, options, tokens=batch * block)
    report.finish()


def add_peft(rank: int, model: Any) -> Any:
    """Add the same adapter with PEFT."""
    import peft

    lora = LoRAConfig(rank=rank)
    peft_config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.scale * lora.rank,
        target_modules=list(lora.target_modules),
        lora_dropout=lora.dropout,
        fan_in_fan_out=True,
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(model, peft_config)


if __name__ == "__main__":
    run_script(main, Options)
