"""Cost of a checkpoint: time of the steps with and without one."""

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

import tyro
from harness import DEVICE, Report, format_number, synchronize
from implementations import random_ids, temporary_folder

from homebrew import Callback, GPTConfig, TokenDataset, Trainer, TrainerConfig


@dataclass
class Options:
    """Measure the steps of a run that saves checkpoints in the background."""

    model: str = "gpt2" if DEVICE.type == "cuda" else "baby"
    """Model preset."""
    block_size: int = 1024 if DEVICE.type == "cuda" else 128
    """Tokens per sequence."""
    tokens: int = 524_288 if DEVICE.type == "cuda" else 2_048
    """Tokens per step."""
    every: int = 5
    """Steps between checkpoints."""
    saves: int = 5
    """Number of checkpoints."""
    json: Path | None = None
    """JSON file for tables and raw times."""


class _StepTimes(Callback):
    """Records the time of each step. `on_step_end` runs before the checkpoint of the step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last = 0.0

    def on_step_end(self, trainer: Trainer) -> None:
        synchronize()
        now = perf_counter()
        self.seconds.append(now - self._last)  # the first value includes compilation and is not used
        self._last = now


def main(options: Options) -> None:
    report, times = Report(options.json), _StepTimes()
    model_config = GPTConfig.preset(options.model, block_size=options.block_size)
    steps = options.every * options.saves + 2
    ids = random_ids(steps * options.tokens + 1, model_config.vocab_size)
    config = TrainerConfig(
        output_dir=temporary_folder(), max_steps=steps, save_every=options.every, global_batch_tokens=options.tokens
    )
    dataset = TokenDataset.from_tokens(ids, model_config.block_size, vocab_size=model_config.vocab_size)
    Trainer(model_config, dataset, config=config, callbacks=[times]).train()

    saving = times.seconds[options.every :: options.every]  # includes the checkpoint of the previous step
    others = [s for i, s in enumerate(times.seconds) if i and i % options.every]
    rows = []
    for name, seconds in (("with a checkpoint", saving), ("without", others)):
        rows.append(
            {
                "steps": name,
                "median ms": format_number(1e3 * median(seconds)),
                "min–max": f"{format_number(1e3 * min(seconds))}–{format_number(1e3 * max(seconds))}",
                "relative to without": f"{median(seconds) / median(others):.3f} ×",
            }
        )
    report.add(f"{options.model} on {DEVICE.type}: a checkpoint every {options.every} steps", rows)
    report.finish()


if __name__ == "__main__":
    main(tyro.cli(Options))
