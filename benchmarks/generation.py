"""Generation throughput of GPT-2 small in bfloat16: homebrew and Transformers."""

from dataclasses import dataclass
from typing import Any

import torch
from command_line import run_script
from harness import DEVICE, ON_GPU, Implementation, Report, RoundOptions, StepTimer
from implementations import hf_model, random_ids

from homebrew import GPT, GPTConfig, Sampling

PROMPT, TOP_K = 16, 50
"""Number of prompt tokens, and of the tokens from which each new one is sampled."""


@dataclass
class Options(RoundOptions):
    """Measure top-k sampling from random weights. A timed step generates one batch of texts."""

    model: str = "gpt2"
    """Model preset."""
    batches: tuple[int, ...] = (1, 32)
    """Batch sizes."""
    new_tokens: int = 512
    """New tokens."""
    eager_tokens: int | None = None
    """New tokens for Transformers without compilation, which is slow; its time is scaled. Default: new_tokens."""
    rounds: int = 3
    steps: int = 1


def main(options: Options) -> None:
    report = Report(options.json)
    config = GPTConfig.preset(options.model)
    homebrew = GPT(config).to(DEVICE, torch.bfloat16).eval()
    baseline, padded = (hf_model(config, pad_vocab=pad).to(DEVICE, torch.bfloat16).eval() for pad in (False, True))
    for model in (baseline, padded):
        model.generation_config.eos_token_id = None  # random weights would stop early
        model.generation_config.pad_token_id = 0
    ours = {"sampling": Sampling(top_k=TOP_K)}
    hf = {"top_k": TOP_K, "do_sample": True, "use_cache": True}
    for batch in options.batches:
        prompt = random_ids(batch * PROMPT, config.vocab_size).view(batch, -1).to(DEVICE)

        def row(name: str, model: Any, about: str, count: int, inputs: Any = prompt, **kwargs: Any) -> Implementation:
            def run_steps(timer: StepTimer) -> None:
                while not timer.tick():
                    with torch.no_grad():
                        output = model.generate(inputs, max_new_tokens=count, **kwargs)
                    if (length := output.shape[1] - PROMPT) != count:
                        raise SystemExit(f"{length} instead of {count} tokens were generated.")
                timer.seconds *= options.new_tokens / count

            return Implementation(name, lambda: run_steps, about)

        count = options.new_tokens
        eager = "dynamic cache, sdpa, not compiled: the defaults"
        implementations = [
            row("homebrew", homebrew, "the defaults", count, **ours),
            row("Transformers", baseline, eager, options.eager_tokens or count, **hf),
        ]
        if ON_GPU:
            static = 'cache_implementation="static", compiled with mode="reduce-overhead"; sdpa, padded vocabulary'
            compiled = row("homebrew, compile=True", homebrew, "compile=True", count, compile=True, **ours)
            name = "Transformers, static cache, compiled"
            theirs = row(name, padded, static, count, cache_implementation="static", **hf)
            implementations = [compiled, *implementations, theirs]
        title = f"{options.model}, bfloat16, {DEVICE.type}: {batch} × ({PROMPT} + {options.new_tokens}) tokens"
        report.measure(title, implementations, options, tokens=batch * options.new_tokens)
    report.finish()


if __name__ == "__main__":
    run_script(main, Options)
