"""Train a GPT on Shakespeare, on a GPU or a CPU."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from homebrew import GPT, GPTConfig, Sampling, TokenDataset, Trainer, TrainerConfig, load_corpus


@dataclass
class Options:
    """Train a GPT on Shakespeare: GPT-2 small on a GPU, a model with 7M parameters on a CPU."""

    text: Path | None = None
    """Text file to train on. Default: Tiny Shakespeare."""
    output_dir: Path = Path("runs/shakespeare")
    """Folder for checkpoints, metrics and run.json."""
    max_steps: int | None = None
    """Number of optimizer steps. Default: 50 on a GPU, 100 on a CPU."""
    resume: bool = False
    """Resume from the newest valid checkpoint in the output folder."""
    seed: int = 42
    """Random seed for weights, train/validation split, data order and dropout."""


# The GPU settings use GPT-3's batch size.
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
    model_config, recipe = RECIPES["gpu" if torch.cuda.is_available() else "cpu"]
    max_steps = options.max_steps or recipe["max_steps"]
    recipe = recipe | {"max_steps": max_steps, "warmup_steps": min(10, max_steps)}
    corpus = load_corpus("tinyshakespeare", path=options.text)
    dataset = TokenDataset.from_text(corpus.text, model_config.block_size, source=corpus.source)
    train, val = dataset.split(0.8, seed=options.seed)
    config = TrainerConfig(output_dir=options.output_dir, seed=options.seed, save_every=50, **recipe)
    trainer = Trainer(GPT(model_config, seed=options.seed), train, eval_dataset=val, config=config)
    trainer.accelerator.print(f"Text: {corpus.source}; {dataset.num_tokens:,} tokens.")
    trainer.train(resume=options.resume)
    sample = trainer.sample("ROMEO:", max_new_tokens=100, sampling=Sampling(top_k=50), seed=options.seed)
    trainer.accelerator.print(f"\n{sample}\n\nCheckpoints, metrics.jsonl and run.json are in {options.output_dir}.")
    trainer.accelerator.print("Use --resume to resume a run that was stopped before its last step.")


if __name__ == "__main__":
    main(tyro.cli(Options))
