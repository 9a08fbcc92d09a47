"""Train with several optimizers and schedules on the same data, and compare their learning curves.

All variants of a seed draw the same weights and read the same batches. With `plain=True` the model is GPT-2 in plain
PyTorch: it has none of homebrew's kernels, and under autocast its residual stream, layer norms and loss are float32.
Two variants that differ only in `plain` are compared at each evaluation: `--variants fast plain:plain=True`.

Every finished run is appended to `runs.jsonl` in the output folder. A run that is already there is not repeated, so an
interrupted script continues where it stopped. With `--variants` and no values, the script only prints the tables of
these runs and draws `learning.png`: loss against steps and seconds. `homebrew plot OUTPUT/runs` draws the other curves.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import learning_curves as curves
import torch
from ablation import KERNELS, switched_off
from command_line import parse_settings, run_script
from harness import Report, describe_machine
from implementations import model_config
from learning_curves import Run, train_and_record
from training_data import Data, shakespeare, source_code

from homebrew import GPT, NonFiniteError, TrainerConfig
from homebrew.cli.open_datasets import open_dataset, open_eval_dataset
from homebrew.errors import ConfigError
from homebrew.io import strict_json

_COSINE, _LINEAR = "lr_schedule=cosine,min_lr_ratio=0.1", "lr_schedule=linear,min_lr_ratio=0.0"
_WSD = "lr_schedule=wsd,decay_fraction=0.6,min_lr_ratio=0.0"
DEFAULT_VARIANTS = (
    *(f"adamw {rate} cosine:optimizer=adamw,learning_rate={rate},{_COSINE}" for rate in ("6e-4", "1e-3", "2e-3")),
    *(f"adamw {rate} linear:optimizer=adamw,learning_rate={rate},{_LINEAR}" for rate in ("6e-4", "1e-3", "2e-3")),
    *(f"muon {rate} wsd:optimizer=muon,learning_rate={rate},{_WSD}" for rate in ("2e-3", "4e-3")),
)
_NOT_OF_THE_TRAINER = ("dropout", "init", "plain")


@dataclass
class Options:
    """Compare the learning curves of several optimizers and schedules."""

    output: Path
    """Folder for the corpus, the runs, and `learning.json`."""
    variants: tuple[str, ...] = DEFAULT_VARIANTS
    """What to compare, each as "name:key=value,key=value" with fields of TrainerConfig, dropout, init, or plain."""
    settings: str = ""
    """Fields of TrainerConfig for all variants, as "key=value,key=value"."""
    seeds: tuple[int, ...] = (42, 43, 44)
    """Seeds of initial weights, data order and dropout."""
    model: str = "gpt2"
    """Model preset, with changes if wanted: "gpt2:n_layer=6,n_head=6,n_embd=384"."""
    block_size: int = 1024
    """Tokens per sequence."""
    global_batch_tokens: int = 131_072
    """Tokens per step."""
    micro_batch_size: int | None = None
    """Sequences per forward and backward pass. Default: the Trainer's."""
    max_steps: int = 360
    """Steps of a run, unless its variant has max_steps."""
    eval_every: int = 20
    """Steps between evaluations."""
    eval_batches: int | None = None
    """Micro-batches per evaluation. Default: the full validation data."""
    target: float | None = None
    """Validation loss to reach. Default: the mean final loss of the best AdamW variant."""
    corpus: str = "source"
    """"source" (the .py files of the installed packages), "shakespeare" (characters of Tiny Shakespeare, the last 10 %
    for validation), or a token or text file."""
    val_file: Path | None = None
    """Validation data for a corpus that is a file. Default: its last 0.5 %."""
    source_tokens: int = 118_000_000
    """Maximum number of tokens of the corpus "source"."""
    stride: int | None = None
    """Characters between the starts of training windows of the corpus "shakespeare". Default: block_size."""
    text: Path | None = None
    """Tiny Shakespeare as a text file. Default: downloaded and cached."""


@dataclass(frozen=True)
class Variant:
    """An optimizer and a schedule to compare."""

    name: str
    settings: dict[str, Any]

    def all_settings(self, options: Options) -> dict[str, Any]:
        """Return the variant's settings, and those that come from the options."""
        return {"max_steps": options.max_steps} | parse_settings(options.settings) | self.settings

    def trainer_config(self, options: Options, *, seed: int) -> TrainerConfig:
        """Return the Trainer's configuration."""
        batch = {name: getattr(options, name) for name in ("global_batch_tokens", "micro_batch_size")}
        settings = batch | self.all_settings(options)
        common = {
            "output_dir": options.output / "runs" / f"{self.name.replace('/', '_')}, seed {seed}",
            "seed": seed,
            "eval_every": options.eval_every,
            "eval_batches": options.eval_batches,
            "log_every": options.eval_every,  # so that seconds are known at each evaluation
            "save_every": None,
        }
        if given := settings.keys() & common.keys():
            raise ConfigError(f"{self.name!r} has {', '.join(sorted(given))}, which the script sets. Leave it out.")
        settings = {name: value for name, value in settings.items() if name not in _NOT_OF_THE_TRAINER}
        config = TrainerConfig(**settings, **common)
        if config.max_steps <= options.eval_every:
            raise ConfigError(
                f"{self.name!r} has {config.max_steps} steps, but its steps are timed after the first evaluation, at "
                f"step {options.eval_every}. Use more steps, or a smaller --eval-every."
            )
        return config

    def model(self, options: Options, vocab_size: int, *, seed: int) -> GPT:
        """Return the model with its initial weights."""
        settings = self.all_settings(options)
        dropout = {name: value for name, value in settings.items() if name == "dropout"}
        config = model_config(options.model, block_size=options.block_size, vocab_size=vocab_size, **dropout)
        return GPT(config, seed=seed, init=settings.get("init", "gpt2"))


def main(options: Options) -> None:
    variants = [
        Variant(name, parse_settings(text)) for name, _, text in (text.partition(":") for text in options.variants)
    ]
    for variant in variants:  # before the first run, which takes minutes
        variant.trainer_config(options, seed=0)
        with torch.device("meta"):  # weights without values
            variant.model(options, vocab_size=2, seed=0)
    if len({variant.name for variant in variants}) < len(variants):
        raise ConfigError("Two variants have the same name. Give each its own, as it is the key of its runs.")
    options.output.mkdir(parents=True, exist_ok=True)
    log = options.output / "runs.jsonl"
    runs = read_runs(log) if log.exists() else []
    if variants:
        runs += train_missing(options, variants, runs, log)
    report_runs(options, runs)


def read_runs(log: Path) -> list[Run]:
    """Read the finished runs. If there are several of a variant and a seed, the last one counts."""
    try:
        runs = [Run(**json.loads(line)) for line in log.read_text(encoding="utf-8").splitlines()]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{log} has a line that is not a run ({error}). Choose another --output.") from error
    if any(run.experiment != runs[0].experiment for run in runs):
        raise ConfigError(f"{log} has runs that differ in their model, batch or corpus. Keep those of one experiment.")
    return list({(run.variant, run.seed): run for run in runs}.values())


def load_data(options: Options) -> Data:
    """Return training data, validation data and a description of the corpus."""
    if options.corpus == "source":
        return source_code(options.output, options.block_size, max_tokens=options.source_tokens)
    if options.corpus == "shakespeare":
        train, val, description = shakespeare(options.text, options.block_size, stride=options.stride)
    else:
        train = open_dataset([Path(options.corpus)], options.block_size, "gpt2")
        if options.val_file is None:
            train, val = train.split(0.995, seed=None)
        else:
            val = open_eval_dataset([options.val_file], train)
        description = {"corpus": options.corpus, "validation": str(options.val_file or "the last 0.5 %")}
    for name, dataset in (("train", train), ("validation", val)):
        description |= {f"{name}_tokens": dataset.num_tokens, f"{name}_fingerprint": dataset.fingerprint}
    return train, val, description


def train_missing(options: Options, variants: list[Variant], finished: list[Run], log: Path) -> list[Run]:
    """Train the variants and seeds that have not been trained yet, seed by seed."""
    train, val, corpus = load_data(options)
    print(", ".join(f"{name}: {value}" for name, value in corpus.items()), file=sys.stderr)
    names = ("model", "block_size", "global_batch_tokens", "micro_batch_size", "eval_every", "eval_batches")
    experiment = {name: getattr(options, name) for name in names} | corpus
    if any(run.experiment != experiment for run in finished):
        raise ConfigError(f"{log} has runs with another model, batch or corpus. Choose another --output.")
    settings_of = {run.variant: run.settings for run in finished}
    done = {(run.variant, run.seed) for run in finished}
    runs = []
    for seed in options.seeds:
        for variant in variants:
            settings = json.loads(strict_json(variant.all_settings(options)))  # as they are read from the file
            if (earlier := settings_of.get(variant.name, settings)) != settings:
                raise ConfigError(f"{log} has {variant.name!r} with {earlier}. Give the variant another name.")
            if (variant.name, seed) in done:
                continue
            try:
                config = variant.trainer_config(options, seed=seed)
                model = variant.model(options, train.vocab_size, seed=seed)
                with switched_off(KERNELS if settings.get("plain") else ()):
                    record = train_and_record(model, train, val, config)
            except NonFiniteError as error:
                print(f"{variant.name}, seed {seed}, is left out: {error}", file=sys.stderr)
                continue
            about = {"variant": variant.name, "seed": seed, "settings": settings, "experiment": experiment}
            run = Run(**record, **about, machine=describe_machine())
            with log.open("a", encoding="utf-8") as file:
                file.write(strict_json(asdict(run)) + "\n")
            print(f"{run.variant}, seed {seed}: {run.losses[-1]:.4f}, {run.seconds[-1]:.1f} s", file=sys.stderr)
            runs.append(run)
    return runs


def report_runs(options: Options, runs: list[Run]) -> None:
    """Print the tables, and write `learning.json` and `learning.png`."""
    if not runs:
        raise ConfigError(f"There are no runs in {options.output}. Give --variants and --seeds.")
    variants, experiment = curves.by_variant(runs), runs[0].experiment
    report = Report(options.output / "learning.json", raw=[asdict(run) for run in runs])
    report.metadata = {"runs on": sorted({run.machine for run in runs}), **experiment, "options": asdict(options)}
    title = f"{experiment['model']}, {experiment['global_batch_tokens']:,} tokens per step"
    report.add(f"{title}: mean ± standard deviation over the seeds", curves.summary_rows(variants))
    reference, target = curves.best_adamw(variants), options.target
    compared = dict(variants)
    if reference is not None and target is None:  # it reaches this at its end, give or take the spread over the seeds
        target = curves.final_loss(compared.pop(reference))
    if reference is not None and target is not None and compared:
        rows = curves.target_rows(compared, target, full_runs=variants[reference])
        report.add(f"To a validation loss of {target:.4f}, relative to the full run of {reference!r}", rows)
    for fast, plain in curves.plain_pairs(variants):
        rows = curves.difference_rows(variants[fast], variants[plain])
        report.add(f"Losses of {fast!r} and {plain!r}, which differ only in their operations", rows)
    report.finish()
    curves.plot(variants, options.output / "learning.png", title=title, target=target)


if __name__ == "__main__":
    run_script(main, Options)
