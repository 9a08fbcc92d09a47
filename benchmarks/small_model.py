"""nanoGPT's shakespeare_char, a model so small that launching its kernels takes longer than running them.

Steps a second against nanoGPT's loop; and with `--to-loss 1.4697` (what nanoGPT's README reports) the wall time of
whole runs, processes started, models compiled and evaluations made, until a validation loss is reached.
"""

import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
import tyro
from alternating import DEVICE, Report, Side, alternate, matmul_peak, number
from sides import homebrew_trainer, nanogpt_loop, random_ids

from homebrew import GPT, Callback, GPTConfig, TokenDataset, Trainer, TrainerConfig, get_tokenizer, load_corpus
from homebrew.metrics.step_metrics import EvalMetrics


@dataclass
class Options:
    """Speed of nanoGPT's shakespeare_char shape: 6 layers, 384 wide, 6 heads."""

    n_layer: int = 6
    n_head: int = 6
    n_embd: int = 384
    block_size: int = 256
    batch: int = 64
    """Sequences a step."""
    dropout: float = 0.2
    """Of both sides."""
    nanogpt: Path | None = None
    """A folder with a copy of nanoGPT; our rewrite of its loop if not given (and no run to a loss)."""
    rounds: int = 7
    """Stretches of each side; 0 to time none."""
    steps: int = 200
    """Timed steps in a stretch."""
    to_loss: float | None = None
    """Also time whole runs until this validation loss."""
    text: Path | None = None
    """Tiny Shakespeare as a file, where it is neither cached nor to be downloaded."""
    max_steps: int = 5000
    """Of the whole runs, and of their learning rates' decay."""
    our_max_steps: int | None = None
    """Of homebrew's whole run, if other."""
    learning_rate: float = 1e-3
    """Peak, of both."""
    eval_every: int = 250
    """Steps between evaluations: nanoGPT's of 200 random batches each of training and validation text, ours of all
    the validation text."""
    stride: int = 16
    """Characters between the starts of our training windows; nanoGPT draws them at random."""
    runs: int = 1
    """Whole runs of each side."""
    json: Path | None = None
    """A file to write the figures to."""
    train_ours: Path | None = None
    """Make homebrew's whole run here and now, into this folder."""


def main(options: Options) -> None:
    if options.train_ours is not None:
        train_ours(options, options.train_ours)
        return
    report = Report(options.json)
    if options.rounds:
        time_steps(options, report)
    if options.to_loss is not None:
        time_runs(options, report, options.to_loss)
    report.finish()


def shape(options: Options) -> GPTConfig:
    """The model, for Tiny Shakespeare's 65 characters."""
    return GPTConfig(
        n_layer=options.n_layer,
        n_head=options.n_head,
        n_embd=options.n_embd,
        block_size=options.block_size,
        vocab_size=65,
        dropout=options.dropout,
    )


def time_steps(options: Options, report: Report) -> None:
    """Steps a second, in turns."""
    config, peak = shape(options), matmul_peak()
    ids = random_ids(1_000_000, config.vocab_size)
    batch = options.batch
    theirs = "nanoGPT" if options.nanogpt else "nanoGPT (rewritten)"
    sides = [
        Side("homebrew Trainer", lambda: homebrew_trainer(GPT(config), ids, micro_batch_size=batch)),
        Side(theirs, lambda: nanogpt_loop(options.nanogpt, config, ids, micro_batch=batch)),
    ]
    measured = alternate(sides, rounds=options.rounds, steps=options.steps, warmup=10)
    tokens = batch * config.block_size
    flops = GPT(config).flops_per_token() * tokens
    title = (
        f"{config.n_layer} layers, {config.n_embd} wide, on {DEVICE.type}: {batch} × {config.block_size} tokens a step"
    )
    report.facts["matrix products"] = f"{peak / 1e12:.2f} TFLOP/s"
    report.add_rates(title, measured, per_step=tokens, flops_per_step=flops, peak=peak)


def time_runs(options: Options, report: Report, target: float) -> None:
    """Wall time from a process's start to the evaluation that reaches the target, in turns."""
    commands = {"homebrew": our_command}
    if options.nanogpt is not None:
        commands["nanoGPT's train.py"] = their_command
    rows = []
    for run in range(options.runs):
        for name, command in commands.items():
            with tempfile.TemporaryDirectory() as folder:
                reached, best, seconds = watch(*command(options, Path(folder)), folder=Path(folder), target=target)
            row = {"side": name, "run": str(run + 1)}
            row[f"seconds to {target}"] = "not reached" if reached is None else f"{reached[1]:.1f}"
            row["at step"] = "" if reached is None else str(reached[0])
            row |= {"best": f"{best[1]:.4f}", "best at step": str(best[0]), "seconds in all": number(seconds)}
            rows.append(row)
            print(", ".join(f"{key}: {value}" for key, value in row.items()), file=sys.stderr)
    report.add(f"Whole runs of at most {options.max_steps} steps, nothing compiled before", rows)


def watch(
    command: list[str], workplace: Path, *, folder: Path, target: float
) -> tuple[tuple[int, float] | None, tuple[int, float], float]:
    """Run a process to its end.

    Returns:
        The first step whose validation loss was at most the target and the seconds until then; the best step and
        its loss; all seconds.
    """
    caches = {name: str(folder / name) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
    began, reached, best = perf_counter(), None, (0, float("inf"))
    log: list[str] = []
    environment = os.environ | caches | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, cwd=workplace, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for step, loss in losses(process.stdout, log):
            if loss < best[1]:
                best = (step, loss)
            if reached is None and loss <= target:
                reached = (step, perf_counter() - began)
    if process.returncode:
        raise SystemExit(f"{command} ended with {process.returncode}:\n{''.join(log[-30:])}")
    return reached, best, perf_counter() - began


def losses(lines: Iterator[str] | None, log: list[str]) -> Iterator[tuple[int, float]]:
    """Steps and validation losses in what a process prints, as nanoGPT prints them."""
    for line in lines or ():
        log.append(line)
        if found := re.match(r"step (\d+): .*val loss ([\d.]+)", line):
            yield int(found[1]), float(found[2])


def our_command(options: Options, folder: Path) -> tuple[list[str], Path]:
    """This script, training."""
    steps = options.our_max_steps or options.max_steps
    words = ["--train-ours", folder / "run", "--max-steps", steps, "--batch", options.batch]
    for name in ("n_layer", "n_head", "n_embd", "block_size", "dropout", "learning_rate", "eval_every", "stride"):
        words += [f"--{name.replace('_', '-')}", getattr(options, name)]
    words += ["--text", options.text.resolve()] if options.text else []
    return [sys.executable, str(Path(__file__).resolve()), *map(str, words)], Path.cwd()


def texts(options: Options) -> tuple[str, str]:
    """The first nine tenths, and the rest."""
    text = load_corpus("tinyshakespeare", path=options.text).text
    border = int(0.9 * len(text))
    return text[:border], text[border:]


class _PrintLoss(Callback):
    def on_evaluate(self, trainer: Trainer, metrics: EvalMetrics) -> None:
        print(f"step {metrics.step}: val loss {metrics.loss:.4f}", flush=True)


def train_ours(options: Options, folder: Path) -> None:
    """NanoGPT's recipe in homebrew: its schedule, its AdamW."""
    train_text, val_text = texts(options)
    tokenizer = get_tokenizer("char", text=train_text + val_text)
    config = GPTConfig(**{**shape(options).__dict__, "vocab_size": tokenizer.vocab_size})
    train = TokenDataset.from_text(train_text, config.block_size, tokenizer=tokenizer, stride=options.stride)
    val = TokenDataset.from_text(val_text, config.block_size, tokenizer=tokenizer)
    settings = TrainerConfig(
        output_dir=folder,
        max_steps=options.max_steps,
        micro_batch_size=options.batch,
        learning_rate=options.learning_rate,
        betas=(0.9, 0.99),
        warmup_steps=min(100, options.max_steps // 10),
        eval_every=options.eval_every,
    )
    Trainer(GPT(config), train, val, config=settings, callbacks=[_PrintLoss()]).train()


def their_command(options: Options, folder: Path) -> tuple[list[str], Path]:
    """NanoGPT's own train.py, in a copy that has the data."""
    home = folder / "nanoGPT"
    shutil.copytree(options.nanogpt or Path(), home, ignore=shutil.ignore_patterns(".git"))
    train_text, val_text = texts(options)
    tokenizer = get_tokenizer("char", text=train_text + val_text)
    data = home / "data" / "shakespeare_char"
    for name, text in (("train", train_text), ("val", val_text)):
        ids = torch.tensor(tokenizer.encode(text)).numpy().astype("uint16")
        ids.tofile(data / f"{name}.bin")
    (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": tokenizer.vocab_size}))
    settings = {
        "n_layer": options.n_layer,
        "n_head": options.n_head,
        "n_embd": options.n_embd,
        "block_size": options.block_size,
        "batch_size": options.batch,
        "dropout": options.dropout,
        "learning_rate": options.learning_rate,
        "min_lr": options.learning_rate / 10,
        "max_iters": options.max_steps,
        "lr_decay_iters": options.max_steps,
        "eval_interval": options.eval_every,
    }
    if DEVICE.type == "cpu":
        settings |= {"device": "cpu", "compile": False, "eval_iters": 20}  # as its README says for a CPU
    words = [f"--{name}={value}" for name, value in settings.items()]
    return [sys.executable, "train.py", "config/train_shakespeare_char.py", *words], home


if __name__ == "__main__":
    main(tyro.cli(Options))
