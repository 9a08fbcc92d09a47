"""Train a GPT on Shakespeare, on whatever this machine has."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from homebrew import GPT, GPTConfig, Sampling, TokenDataset, Trainer, TrainerConfig, load_corpus


@dataclass
class Options:
    """Train a GPT on Shakespeare: GPT-2 small on a GPU, a baby of 7 M parameters on a CPU."""

    text: Path | None = None
    """A text file to learn instead of Tiny Shakespeare."""
    output_dir: Path = Path("runs/shakespeare")
    """Where checkpoints, metrics and the run's facts go."""
    max_steps: int | None = None
    """Optimizer steps; 50 on a GPU and 100 on a CPU if not given."""
    resume: bool = False
    """Go on from the newest checkpoint in the output folder."""
    seed: int = 42
    """Of the weights, the split, the order of samples and dropout."""


# The GPU's recipe is GPT-3's batch and the schedule this project grew out of.
RECIPES: dict[str, tuple[GPTConfig, dict[str, Any]]] = {
    "gpu": (
        GPTConfig.preset("gpt2"),
        {"max_steps": 50, "global_batch_tokens": 524_288, "learning_rate": 3e-4, "log_every": 1},
    ),
    "cpu": (
        GPTConfig.preset("baby"),
        {"max_steps": 100, "global_batch_tokens": 2_048, "learning_rate": 3e-3, "log_every": 5, "eval_batches": 16},
    ),
}


def main(options: Options) -> None:
    shape, recipe = RECIPES["gpu" if torch.cuda.is_available() else "cpu"]
    max_steps = options.max_steps or recipe["max_steps"]
    recipe = recipe | {"max_steps": max_steps, "warmup_steps": min(10, max_steps)}
    corpus = load_corpus("tinyshakespeare", path=options.text)
    dataset = TokenDataset.from_text(corpus.text, shape.block_size, source=corpus.source)
    train, val = dataset.split(0.8, seed=options.seed)
    config = TrainerConfig(output_dir=options.output_dir, seed=options.seed, save_every=50, **recipe)
    trainer = Trainer(GPT(shape, seed=options.seed), train, eval_dataset=val, config=config)
    trainer.accelerator.print(f"Text: {corpus.source}; {dataset.num_tokens:,} tokens.")
    trainer.train(resume=options.resume)
    said = trainer.sample("ROMEO:", max_new_tokens=100, sampling=Sampling(top_k=50), seed=options.seed)
    trainer.accelerator.print(f"\n{said}\n\nCheckpoints, metrics.jsonl and run.json are in {options.output_dir}.")
    trainer.accelerator.print("A run that was stopped before its last step goes on with --resume.")


if __name__ == "__main__":
    main(tyro.cli(Options))
