"""Tokens a second of text written by GPT-2 small in bfloat16: homebrew's generate against transformers'."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from alternating import DEVICE, Clock, Report, Side, Stretch, alternate
from sides import hf_model, random_ids

from homebrew import GPT, GPTConfig, Sampling


@dataclass
class Options:
    """Speed of sampling with top-k from random weights; each step of a stretch is a whole text."""

    model: str = "gpt2"
    """A preset."""
    batches: tuple[int, ...] = (1, 32)
    """Texts at once."""
    prompt: int = 16
    """Tokens given."""
    new_tokens: int = 512
    """Tokens written."""
    eager_tokens: int | None = None
    """Tokens written in transformers' default way, if other: the host takes the same time for each, and much of it."""
    top_k: int = 50
    """Ids drawn from."""
    compiled: bool = DEVICE.type == "cuda"
    """Also time both sides' compiled ways."""
    rounds: int = 3
    """Stretches of each side."""
    steps: int = 1
    """Timed texts (or batches of them) in a stretch."""
    json: Path | None = None
    """A file to write the figures to."""


def main(options: Options) -> None:
    report = Report(options.json)
    shape = GPTConfig.preset(options.model)
    ours = GPT(shape).to(DEVICE, torch.bfloat16).eval()
    theirs = hf_model(shape).to(DEVICE, torch.bfloat16).eval()
    theirs.generation_config.eos_token_id = None  # random weights would end a text early
    theirs.generation_config.pad_token_id = 0
    for batch in options.batches:
        prompt = random_ids(batch * options.prompt, shape.vocab_size).view(batch, -1).to(DEVICE)
        sampling = Sampling(top_k=options.top_k)

        def write(
            model: Any, prompt: torch.Tensor = prompt, count: int = options.new_tokens, **how: Any
        ) -> Callable[[], Stretch]:
            def text() -> None:
                with torch.no_grad():
                    written = model.generate(prompt, max_new_tokens=count, **how)
                if written.shape[1] != options.prompt + count:
                    raise SystemExit(f"{written.shape[1] - options.prompt} tokens were written instead of {count}.")

            def stretch(clock: Clock) -> None:
                while not clock.tick():
                    text()
                clock.seconds *= options.new_tokens / count

            return lambda: stretch

        hf = {"top_k": options.top_k, "do_sample": True, "use_cache": True}
        sides = []
        if options.compiled:
            sides += [Side("homebrew, compile=True", write(ours, sampling=sampling, compile=True))]
        default = write(theirs, count=options.eager_tokens or options.new_tokens, **hf)
        sides += [Side("homebrew", write(ours, sampling=sampling)), Side("transformers", default)]
        if options.compiled:
            static = write(theirs, **hf, cache_implementation="static")
            sides += [Side("transformers, static cache, compiled", static)]
        measured = alternate(sides, rounds=options.rounds, steps=options.steps)
        title = f"{options.model}, bfloat16, {DEVICE.type}: {batch} × ({options.prompt} + {options.new_tokens}) tokens"
        report.add_rates(title, measured, per_step=batch * options.new_tokens)
    report.finish()


if __name__ == "__main__":
    main(tyro.cli(Options))
