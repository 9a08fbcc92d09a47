"""Train a GPT on Shakespeare, on a GPU or a CPU."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from homebrew import (
    EarlyStopping,
    GPTConfig,
    HomebrewError,
    Sampling,
    TokenDataset,
    Trainer,
    TrainerConfig,
    load_corpus,
)


@dataclass
class Options:
    """Train a GPT on Shakespeare and print a sample."""

    text: Path | None = None
    """Text to train on: a file or a folder. Default: Tiny Shakespeare."""
    recipe: Literal["auto", "gpt2", "char", "notebook"] = "auto"
    """gpt2: GPT-2 small, for a GPU. char: a small character-level model, for a CPU. notebook: GPT-2 small with GPT-3's
    batch size of half a million tokens, more than Tiny Shakespeare has. auto: gpt2 on a GPU, char on a CPU."""
    optimizer: Literal["auto", "adamw", "muon"] = "auto"
    """auto: Muon for char, AdamW for the others. Only char supports both."""
    output_dir: Path = Path("runs/shakespeare")
    """Folder for checkpoints, metrics and run.json."""
    max_steps: int | None = None
    """Number of optimizer steps. Default: the recipe's."""
    resume: bool = False
    """Resume from the newest valid checkpoint in the output folder."""
    overwrite: bool = False
    """Start a new run in an output folder that already holds one. The earlier run is moved to old-1, old-2, … in it."""
    seed: int = 42
    """Random seed for weights, train/validation split, data order and dropout."""


@dataclass(frozen=True)
class Recipe:
    """A model and how to train it."""

    model: GPTConfig
    tokenizer: str
    optimizer: Literal["adamw", "muon"]
    max_steps: int
    max_epochs: int | None = None
    """Maximum number of epochs. After more epochs, the model learns a short text by heart."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of `TrainerConfig`."""


_CHAR = Recipe(
    GPTConfig.preset("char"),
    tokenizer="char",
    optimizer="muon",
    max_steps=1_800,
    settings={
        "global_batch_tokens": 1_536,
        "learning_rate": 1.5e-2,
        "lr_schedule": "linear",
        "log_every": 25,
        "eval_batches": 100,
    },
)
_GPT2 = Recipe(
    GPTConfig.preset("gpt2", dropout=0.2),
    tokenizer="gpt2",
    optimizer="adamw",
    max_steps=1_400,
    max_epochs=12,
    settings={"global_batch_tokens": 8_192, "learning_rate": 5e-4, "warmup_steps": 22, "log_every": 20},
)
_NOTEBOOK = Recipe(
    GPTConfig.preset("gpt2"),
    tokenizer="gpt2",
    optimizer="adamw",
    max_steps=50,
    settings={"global_batch_tokens": 524_288, "learning_rate": 3e-4, "warmup_steps": 10, "log_every": 1},
)
RECIPES = {
    "char": (
        _CHAR,
        replace(
            _CHAR,
            optimizer="adamw",
            max_steps=2_800,
            settings=_CHAR.settings | {"learning_rate": 5e-3, "lr_schedule": "cosine"},
        ),
    ),
    "gpt2": (_GPT2,),
    "notebook": (_NOTEBOOK,),
}
"""Recipes by name. The first of each name has the best optimizer."""


def choose_recipe(name: str, optimizer: str) -> Recipe:
    """Return the recipe for an optimizer, or for the best one with "auto"."""
    recipes = {recipe.optimizer: recipe for recipe in RECIPES[name]}
    if optimizer == "auto":
        return RECIPES[name][0]
    if optimizer not in recipes:
        raise SystemExit(f"--recipe {name} does not support --optimizer {optimizer}. Use: {', '.join(recipes)}.")
    return recipes[optimizer]


def main(options: Options) -> None:
    name = options.recipe
    if name == "auto":
        name = "gpt2" if torch.cuda.is_available() else "char"
    recipe = choose_recipe(name, options.optimizer)
    corpus = load_corpus("tinyshakespeare", path=options.text)
    dataset = TokenDataset.from_text(
        corpus.text, recipe.model.block_size, tokenizer=recipe.tokenizer, source=corpus.source
    )
    train, val = dataset.split(0.9, seed=options.seed)
    max_steps = options.max_steps or recipe.max_steps
    if recipe.max_epochs is not None and options.max_steps is None:
        tokens = recipe.max_epochs * len(train) * recipe.model.block_size
        max_steps = max(1, min(max_steps, tokens // recipe.settings["global_batch_tokens"]))
    settings = dict(recipe.settings)
    if "warmup_steps" in settings:
        settings["warmup_steps"] = min(settings["warmup_steps"], max_steps)
    config = TrainerConfig(
        output_dir=options.output_dir,
        max_steps=max_steps,
        eval_every=-(-max_steps // 5),
        seed=options.seed,
        optimizer=recipe.optimizer,
        **settings,
    )
    model = replace(recipe.model, vocab_size=dataset.vocab_size)
    trainer = Trainer(model, train, val, config=config, callbacks=[EarlyStopping(patience=2)])
    trainer.accelerator.print(
        f"Recipe: {name}, {recipe.optimizer}. Text: {corpus.source}; {dataset.num_tokens:,} tokens."
    )
    trainer.train(resume=options.resume, overwrite=options.overwrite)
    sampling = Sampling(temperature=0.8, top_k=50)
    sample = trainer.sample("ROMEO:", max_new_tokens=200, sampling=sampling, seed=options.seed)
    trainer.accelerator.print(f"\n{sample}\n\nCheckpoints, metrics.jsonl and run.json are in {options.output_dir}.")


if __name__ == "__main__":
    try:
        main(tyro.cli(Options))
    except HomebrewError as error:  # its message says what to do
        raise SystemExit(str(error)) from None
