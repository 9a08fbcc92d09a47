"""What a checkpoint costs: the step during which one is taken, in the background, against its neighbours."""

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

import tyro
from alternating import DEVICE, Report, number, synchronize
from sides import random_ids, temporary_folder

from homebrew import Callback, GPTConfig, TokenDataset, Trainer, TrainerConfig


@dataclass
class Options:
    """Time a run's steps, of which some are followed by a checkpoint."""

    model: str = "gpt2" if DEVICE.type == "cuda" else "baby"
    """A preset."""
    block_size: int = 1024 if DEVICE.type == "cuda" else 128
    """Tokens in a sequence."""
    tokens: int = 524_288 if DEVICE.type == "cuda" else 2_048
    """In a step."""
    every: int = 5
    """Steps from one checkpoint to the next."""
    saves: int = 5
    """Checkpoints."""
    json: Path | None = None
    """A file to write the figures to."""


class _Times(Callback):
    """When each step was over; `on_step_end` comes before the step's checkpoint is taken."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last = 0.0

    def on_step_end(self, trainer: Trainer) -> None:
        synchronize()
        now = perf_counter()
        self.seconds.append(now - self._last)  # the first, which compiles, means nothing
        self._last = now


def main(options: Options) -> None:
    report, times = Report(options.json), _Times()
    shape = GPTConfig.preset(options.model, block_size=options.block_size)
    steps = options.every * options.saves + 2
    ids = random_ids(steps * options.tokens + 1, shape.vocab_size)
    config = TrainerConfig(
        output_dir=temporary_folder(), max_steps=steps, save_every=options.every, global_batch_tokens=options.tokens
    )
    dataset = TokenDataset.from_tokens(ids, shape.block_size, vocab_size=shape.vocab_size)
    Trainer(shape, dataset, config=config, callbacks=[times]).train()

    saving = times.seconds[options.every :: options.every]  # a checkpoint is taken between two calls
    others = [s for i, s in enumerate(times.seconds) if i and i % options.every]
    rows = []
    for name, found in (("a checkpoint is taken", saving), ("the others", others)):
        rows.append(
            {
                "steps in which": name,
                "median ms": number(1e3 * median(found)),
                "fastest–slowest": f"{number(1e3 * min(found))}–{number(1e3 * max(found))}",
                "of the others' median": f"{median(found) / median(others):.3f} ×",
            }
        )
    report.add(f"{options.model} on {DEVICE.type}: a checkpoint every {options.every} steps", rows)
    report.finish()


if __name__ == "__main__":
    main(tyro.cli(Options))
