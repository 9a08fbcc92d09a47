"""Start-up time: from process start to the end of the first training step, with a cold and a warm compile cache."""

import os
import subprocess
import tempfile
import time
from dataclasses import dataclass
from operator import truediv
from pathlib import Path
from statistics import median

from command_line import command_of, run_script
from harness import Report, StepTimer
from implementations import homebrew_trainer, nanogpt, random_ids

from homebrew import GPT, GPTConfig
from homebrew.errors import ConfigError


@dataclass
class Options:
    """Measure the time from process start to the end of the first training step."""

    rounds: int = 1
    """Number of rounds. In each, an implementation starts with an empty cache, then with a warm one."""
    model: str = "gpt2"
    """Model preset."""
    block_size: int = 1024
    """Tokens per sequence."""
    tokens: int = 65_536
    """Tokens per step."""
    micro_batch: int | None = None
    """Micro-batch size. Default: the Trainer's choice, and all sequences of a step for nanoGPT."""
    max_steps: int = 500
    """Steps of the Trainer's run, which it considers when it decides what to compile."""
    nanogpt: Path | None = None
    """Folder with a clone of nanoGPT. Default: skip nanoGPT."""
    json: Path | None = None
    """JSON file for tables and raw times."""
    first_step: float | None = None
    """Internal: time at which this process was started. It runs a first step, of nanoGPT if `nanogpt` is given, and
    prints the seconds since then."""


def main(options: Options) -> None:
    if options.first_step is not None:
        print(run_first_step(options, options.first_step))
        return
    if options.rounds < 1:
        raise ConfigError(f"--rounds {options.rounds}: must be at least 1.")
    report = Report(options.json)
    sides = {"homebrew Trainer": None} | ({"nanoGPT": options.nanogpt} if options.nanogpt else {})
    times: dict[str, dict[str, list[float]]] = {cache: {name: [] for name in sides} for cache in ("cold", "warm")}
    for turn in range(options.rounds):
        for name, folder in sides.items() if turn % 2 == 0 else reversed(sides.items()):
            with tempfile.TemporaryDirectory() as cache:
                for seconds in times.values():
                    seconds[name].append(time_first_step(options, Path(cache), folder))
    rows = []
    for cache, seconds in times.items():
        row = {"compile cache": cache} | {name: f"{median(values):.1f}" for name, values in seconds.items()}
        if options.nanogpt:
            row["speedup"] = f"{median(map(truediv, seconds['nanoGPT'], seconds['homebrew Trainer'])):.3f} ×"
        rows.append(row)
    report.add(f"{options.model}: seconds from process start to the end of the first step", rows)
    report.raw.append(times)
    report.finish()


def time_first_step(options: Options, cache: Path, nanogpt: Path | None) -> float:
    """Run a first step, of homebrew or nanoGPT, in a new process with its compile cache in `cache`."""
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"), "TRITON_CACHE_DIR": str(cache / "triton")}
    values = {name: getattr(options, name) for name in ("model", "block_size", "tokens", "micro_batch", "max_steps")}
    command = command_of(__file__, **values, nanogpt=nanogpt, first_step=time.time())
    process = subprocess.run(command, env=os.environ | caches, capture_output=True, text=True, check=False)
    if process.returncode:
        raise SystemExit(process.stderr[-3000:])
    return float(process.stdout.splitlines()[-1])


def run_first_step(options: Options, started: float) -> float:
    """Run one step and return the seconds since `started`."""
    config = GPTConfig.preset(options.model, block_size=options.block_size)
    ids = random_ids(200 * config.block_size, config.vocab_size)
    if options.nanogpt:
        micro_batch = options.micro_batch or options.tokens // config.block_size
        sizes = {"micro_batch": micro_batch, "accumulation": options.tokens // (micro_batch * config.block_size)}
        run = nanogpt(options.nanogpt, config, ids, bias=True, **sizes).build()
    else:
        batch = {"global_batch_tokens": options.tokens, "micro_batch_size": options.micro_batch}
        run = homebrew_trainer(GPT(config), ids, **batch, max_steps=options.max_steps)
    StepTimer.now = time.time
    timer = StepTimer(1, 1)
    run(timer)
    return timer.started_at - started


if __name__ == "__main__":
    run_script(main, Options)
