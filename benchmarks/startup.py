"""Start-up time: imports, and the first training step with a cold and a warm compile cache.

python benchmarks/startup.py                                # imports, and the first step of a short run
python benchmarks/startup.py --runs 0 --nanogpt FOLDER      # the first step, also of nanoGPT's training loop
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from operator import truediv
from pathlib import Path
from statistics import median

from harness import Report, StepTimer
from implementations import homebrew_trainer, nanogpt, random_ids
from run_script import run_script

from homebrew import GPT, GPTConfig

BASE = "import torch, accelerate"
IMPORTS = ("import homebrew", "from homebrew import GPT, GPTConfig, TokenDataset, Trainer, TrainerConfig", BASE)


@dataclass
class Options:
    """Measure processes from their start."""

    runs: int = 9
    """Processes per import, interleaved. 0 skips the imports."""
    processor_time: bool = False
    """Measure the CPU time of imports instead of wall time, for a machine that other processes use."""
    model: str = "gpt2"
    """Model preset for the first step. Empty: skip the first step."""
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
    compile: bool = False
    """Compile on a CPU, too."""
    json: Path | None = None
    """JSON file for tables and raw times."""
    first_step: float | None = None
    """Internal: run a first step in this process, which was started at this time, and print the seconds. It is that of
    nanoGPT if `nanogpt` is given."""


def main(options: Options) -> None:
    if options.first_step is not None:
        print(run_first_step(options, options.first_step))
        return
    report = Report(options.json)
    if options.runs:
        times = time_imports(options.runs, processor_time=options.processor_time)
        rows = []
        for name, seconds in times.items():
            row = {"process": name, "median s": f"{median(seconds):.3f}"}
            row["min–max"] = f"{min(seconds):.3f}–{max(seconds):.3f}"
            row["relative to torch, accelerate"] = f"{median(map(truediv, seconds, times[BASE])):.3f} ×"
            rows.append(row)
        clock = "CPU time" if options.processor_time else "wall time"
        report.add(f"Imports, {options.runs} processes each, interleaved, {clock}", rows)
        report.raw.append({"imports": times})
    if options.model:
        sides = {"homebrew Trainer": None} | ({"nanoGPT": options.nanogpt} if options.nanogpt else {})
        with contextlib.ExitStack() as stack:
            caches = {name: Path(stack.enter_context(tempfile.TemporaryDirectory())) for name in sides}
            rows = [
                {"compile cache": state}
                | {name: f"{time_first_step(options, caches[name], folder):.1f}" for name, folder in sides.items()}
                for state in ("cold", "warm", "warm again")
            ]
        report.add(f"{options.model}: seconds from process start to the end of the first step", rows)
    report.finish()


def time_imports(runs: int, *, processor_time: bool) -> dict[str, list[float]]:
    """Return the seconds of each process. The first process of each import fills the disk cache and is not counted."""
    times: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for turn in range(runs + 1):
        for name in IMPORTS:
            start = _now(processor_time=processor_time)
            subprocess.run([sys.executable, "-c", name], check=True)
            if turn:
                times[name].append(_now(processor_time=processor_time) - start)
    return times


def _now(*, processor_time: bool) -> float:
    """Return the wall time, or the CPU time of finished child processes, in seconds."""
    times = os.times()
    return times.children_user + times.children_system if processor_time else time.perf_counter()


def time_first_step(options: Options, cache: Path, nanogpt: Path | None) -> float:
    """Run a first step, of homebrew or nanoGPT, in a new process with its compile cache in `cache`."""
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"), "TRITON_CACHE_DIR": str(cache / "triton")}
    values = {name: getattr(options, name) for name in ("model", "block_size", "tokens", "micro_batch", "max_steps")}
    values = {name: value for name, value in (values | {"nanogpt": nanogpt}).items() if value is not None}
    arguments = [text for name, value in values.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    arguments += ["--compile"] if options.compile else []
    command = [sys.executable, __file__, *arguments, "--first-step", repr(time.time())]
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
        settings = {"compile": options.compile or "auto", "max_steps": options.max_steps}
        run = homebrew_trainer(GPT(config), ids, **batch, **settings)
    StepTimer.now = time.time
    timer = StepTimer(1, 1)
    run(timer)
    return timer.started_at - started


if __name__ == "__main__":
    run_script(main, Options)
