"""Generation throughput of GPT-2 small in bfloat16: homebrew and Transformers."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from harness import DEVICE, Implementation, Report, RunSteps, StepTimer, measure_interleaved
from implementations import hf_model, random_ids

from homebrew import GPT, GPTConfig, Sampling


@dataclass
class Options:
    """Measure top-k sampling from random weights. A timed step generates one batch of texts."""

    model: str = "gpt2"
    """Model preset."""
    batches: tuple[int, ...] = (1, 32)
    """Batch sizes."""
    prompt: int = 16
    """Prompt tokens."""
    new_tokens: int = 512
    """New tokens."""
    eager_tokens: int | None = None
    """New tokens for Transformers without compilation, which is slow; its time is scaled. Default: new_tokens."""
    top_k: int = 50
    """Sample from the k most likely tokens."""
    compiled: bool = DEVICE.type == "cuda"
    """Also measure both with compilation."""
    rounds: int = 3
    """Number of rounds. Each implementation runs once per round."""
    steps: int = 1
    """Timed batches per implementation and round."""
    json: Path | None = None
    """JSON file for tables and raw times."""


def main(options: Options) -> None:
    report = Report(options.json)
    config = GPTConfig.preset(options.model)
    homebrew = GPT(config).to(DEVICE, torch.bfloat16).eval()
    baseline, padded = (hf_model(config, pad_vocab=pad).to(DEVICE, torch.bfloat16).eval() for pad in (False, True))
    for model in (baseline, padded):
        model.generation_config.eos_token_id = None  # random weights would stop early
        model.generation_config.pad_token_id = 0
    for batch in options.batches:
        prompt = random_ids(batch * options.prompt, config.vocab_size).view(batch, -1).to(DEVICE)
        sampling = Sampling(top_k=options.top_k)

        def generate(
            model: Any, prompt: torch.Tensor = prompt, count: int = options.new_tokens, **kwargs: Any
        ) -> Callable[[], RunSteps]:
            def generate_batch() -> None:
                with torch.no_grad():
                    output = model.generate(prompt, max_new_tokens=count, **kwargs)
                if output.shape[1] != options.prompt + count:
                    raise SystemExit(f"{output.shape[1] - options.prompt} tokens were generated instead of {count}.")

            def run_steps(timer: StepTimer) -> None:
                while not timer.tick():
                    generate_batch()
                timer.seconds *= options.new_tokens / count

            return lambda: run_steps

        hf = {"top_k": options.top_k, "do_sample": True, "use_cache": True}
        implementations = []
        if options.compiled:
            implementations += [
                Implementation("homebrew, compile=True", generate(homebrew, sampling=sampling, compile=True))
            ]
        default = generate(baseline, count=options.eager_tokens or options.new_tokens, **hf)
        implementations += [
            Implementation("homebrew", generate(homebrew, sampling=sampling)),
            Implementation("Transformers", default, "defaults: dynamic cache, sdpa, not compiled"),
        ]
        if options.compiled:
            static = generate(padded, **hf, cache_implementation="static")
            settings = (
                'cache_implementation="static", which compiles with mode="reduce-overhead"; sdpa, vocabulary padded to '
                "a multiple of 64"
            )
            implementations += [Implementation("Transformers, static cache, compiled", static, settings)]
        measurements = measure_interleaved(implementations, rounds=options.rounds, steps=options.steps)
        title = f"{options.model}, bfloat16, {DEVICE.type}: {batch} × ({options.prompt} + {options.new_tokens}) tokens"
        report.add_throughput(title, measurements, per_step=batch * options.new_tokens)
    report.finish()


if __name__ == "__main__":
    main(tyro.cli(Options))
