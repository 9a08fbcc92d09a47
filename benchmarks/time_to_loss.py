"""Time from process start to a validation loss on nanoGPT's shakespeare_char: homebrew and nanoGPT's train.py.

The wall time includes compilation and evaluations. The default loss is the one in nanoGPT's README.
"""

import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from command_line import command_of, parse_settings, run_script
from harness import ON_GPU, Report, format_number
from training_data import shakespeare

from homebrew import Callback, ConfigError, EvalMetrics, GPTConfig, Trainer, TrainerConfig


@dataclass
class Options:
    """Measure complete runs of nanoGPT's shakespeare_char: 6 layers, width 384, 6 heads."""

    n_layer: int = 6
    n_head: int = 6
    n_embd: int = 384
    block_size: int = 256
    batch: int = 64
    """Sequences per step."""
    dropout: float = 0.2
    """Dropout probability."""
    nanogpt: Path | None = None
    """Folder with a clone of nanoGPT. Default: only homebrew is measured."""
    loss: float = 1.4697
    """Validation loss to reach."""
    text: Path | None = None
    """Tiny Shakespeare as a text file. Default: downloaded and cached."""
    max_steps: int = 5000
    """Steps of a complete run, and of its learning-rate decay."""
    ours: str = ""
    """Settings of homebrew's complete runs, "key=value,…": fields of TrainerConfig, or dropout. Default: nanoGPT's."""
    eval_every: int = 250
    """Steps between evaluations: of 200 random batches of each split in nanoGPT, of all validation data in homebrew."""
    runs: int = 1
    """Complete runs per implementation."""
    json: Path | None = None
    """JSON file for tables and raw times."""
    train_homebrew: Path | None = None
    """Internal: run homebrew's training in this process, with this output folder."""

    def named(self, *names: str) -> dict[str, Any]:
        """Return some of the options."""
        return {name: getattr(self, name) for name in (*MODEL, *names)}


MODEL = ("n_layer", "n_head", "n_embd", "block_size", "dropout")


def main(options: Options) -> None:
    if options.train_homebrew is not None:
        train_homebrew(options, options.train_homebrew)
        return
    report = Report(options.json)
    commands = {"homebrew": homebrew_command}
    if options.nanogpt is not None:
        if not (options.nanogpt / "train.py").exists():
            raise ConfigError(f"--nanogpt {options.nanogpt}: has no train.py. Pass a clone of nanoGPT.")
        commands["nanoGPT's train.py"] = nanogpt_command
    rows = []
    for run in range(options.runs):
        for name, command in commands.items():
            with tempfile.TemporaryDirectory() as folder:
                evaluations, seconds = watch(*command(options, Path(folder)), folder=Path(folder))
            reached = next((each for each in evaluations if each[1] <= options.loss), None)
            best = min(evaluations, key=lambda each: each[1])
            row = {"implementation": name, "run": str(run + 1)}
            row[f"seconds to {options.loss}"] = "not reached" if reached is None else f"{reached[2]:.1f}"
            row["at step"] = "" if reached is None else str(reached[0])
            row |= {"best": f"{best[1]:.4f}", "best at step": str(best[0]), "total seconds": format_number(seconds)}
            rows.append(row)
            print(", ".join(f"{key}: {value}" for key, value in row.items()), file=sys.stderr)
    report.add(f"Complete runs of at most {options.max_steps} steps, empty compile cache", rows)
    report.finish()


def watch(command: list[str], working_directory: Path, *, folder: Path) -> tuple[list[tuple[int, float, float]], float]:
    """Run a process until it exits. Return step, validation loss and seconds of its evaluations, and total seconds."""
    caches = {name: str(folder / name) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
    environment = os.environ | caches | {"PYTHONUNBUFFERED": "1"}
    log: list[str] = []
    evaluations, started = [], perf_counter()
    with subprocess.Popen(
        command, cwd=working_directory, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout or ():
            log.append(line)
            if match := re.match(r"step (\d+): .*val loss ([\d.]+)", line):  # nanoGPT's format
                evaluations.append((int(match[1]), float(match[2]), perf_counter() - started))
    if process.returncode or not evaluations:
        raise SystemExit(f"{command} failed with exit code {process.returncode}:\n{''.join(log[-30:])}")
    return evaluations, perf_counter() - started


def homebrew_command(options: Options, folder: Path) -> tuple[list[str], Path]:
    """Return the command that runs homebrew's training, and its working directory."""
    values = options.named("ours", "text", "batch", "max_steps", "eval_every")
    return command_of(__file__, train_homebrew=folder / "run", **values), Path.cwd()


class _PrintEvalLoss(Callback):
    def on_evaluate(self, trainer: Trainer, metrics: EvalMetrics) -> None:
        print(f"step {metrics.step}: val loss {metrics.loss:.4f}", flush=True)


def train_homebrew(options: Options, folder: Path) -> None:
    """Train with homebrew, using nanoGPT's settings unless `ours` overrides them."""
    ours = parse_settings(options.ours)
    model = options.named() | {name: ours.pop(name) for name in {"dropout"} & ours.keys()}
    # The windows overlap, because nanoGPT samples windows at random.
    train, val, _ = shakespeare(options.text, options.block_size, stride=16)
    settings = {"output_dir": folder, "micro_batch_size": options.batch, "eval_every": options.eval_every}
    settings |= {"max_steps": options.max_steps, "learning_rate": 1e-3, "betas": (0.9, 0.99)} | ours
    config = TrainerConfig(**{"warmup_steps": min(100, settings["max_steps"] // 10)} | settings)
    model_config = GPTConfig(vocab_size=train.vocab_size, **model)
    Trainer(model_config, train, val, config=config, callbacks=[_PrintEvalLoss()]).train()


def nanogpt_command(options: Options, folder: Path) -> tuple[list[str], Path]:
    """Return the command that runs nanoGPT's train.py in a copy with the data, and its working directory."""
    clone = folder / "nanoGPT"
    shutil.copytree(options.nanogpt or Path(), clone, ignore=shutil.ignore_patterns(".git"))
    train, val, _ = shakespeare(options.text, options.block_size, stride=None)
    data = clone / "data" / "shakespeare_char"
    for name, dataset in (("train", train), ("val", val)):
        dataset.tokens.ids.numpy().astype(np.uint16).tofile(data / f"{name}.bin")
    (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": train.vocab_size}))
    settings = options.named() | dict.fromkeys(("max_iters", "lr_decay_iters"), options.max_steps)
    settings |= {"batch_size": options.batch, "eval_interval": options.eval_every}
    if not ON_GPU:
        settings |= {"device": "cpu", "compile": False, "eval_iters": 20}  # as in nanoGPT's README for a CPU
    arguments = [f"--{name}={value}" for name, value in settings.items()]
    return [sys.executable, "train.py", "config/train_shakespeare_char.py", *arguments], clone


if __name__ == "__main__":
    run_script(main, Options)
