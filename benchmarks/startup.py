"""How long it takes to start: the import, and a run's first step with a cold, a warm and a damaged compile cache."""

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from operator import truediv
from pathlib import Path
from statistics import median

import tyro

BASE = "import torch, accelerate"
IMPORTS = ("import homebrew", "from homebrew import GPT, GPTConfig, TokenDataset, Trainer, TrainerConfig", BASE)


@dataclass
class Options:
    """Time of processes, from their start."""

    runs: int = 9
    """Processes for each import, in turns; 0 for none."""
    processor_time: bool = False
    """The imports' processor time instead of the wall's: for a machine that others use meanwhile."""
    model: str = "gpt2"
    """A preset to take a first step with; none if empty."""
    block_size: int = 1024
    """Tokens in a sequence."""
    micro_batch: int | None = None
    """Sequences in the first step; what the Trainer chooses if not given."""
    compile: bool = False
    """Compile where the Trainer would not by itself: on a CPU."""
    json: Path | None = None
    """A file to write the figures to."""
    first_step: float | None = None
    """Take a first step in this process, which was started at this time, and print the seconds."""


def main(options: Options) -> None:
    if options.first_step is not None:
        print(take_first_step(options, options.first_step))
        return
    from alternating import Report

    report = Report(options.json)
    if options.runs:
        times = time_imports(options.runs, processor_time=options.processor_time)
        rows = [
            {
                "process": name,
                "median s": f"{median(seconds):.3f}",
                "fastest–slowest": f"{min(seconds):.3f}–{max(seconds):.3f}",
                "of torch, accelerate": f"{median(map(truediv, seconds, times[BASE])):.3f} ×",
            }
            for name, seconds in times.items()
        ]
        clock = "processor time" if options.processor_time else "wall time"
        report.add(f"Imports, {options.runs} processes each, in turns, {clock}", rows)
        report.raw.append({"imports": times})
    if options.model:
        report.add(f"{options.model}: from the process's start to the end of the first step", first_steps(options))
    report.finish()


def time_imports(runs: int, *, processor_time: bool) -> dict[str, list[float]]:
    """Seconds of each process, in turns, after one of each that fills the disk cache."""
    times: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for turn in range(runs + 1):
        for name in IMPORTS:
            began = _now(processor_time=processor_time)
            subprocess.run([sys.executable, "-c", name], check=True)
            if turn:
                times[name].append(_now(processor_time=processor_time) - began)
    return times


def _now(*, processor_time: bool) -> float:
    """Seconds of the wall's clock, or those that ended processes of ours have had."""
    spent = os.times()
    return spent.children_user + spent.children_system if processor_time else time.perf_counter()


def first_steps(options: Options) -> list[dict[str, str]]:
    """A cold cache, a warm one, and one in which every other file was cut in half."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("cold", "warm", "warm again", "damaged"):
            if name == "damaged":
                damage(Path(folder))
            rows.append({"compile cache": name, "seconds to the first step": f"{ask(options, Path(folder)):.1f}"})
    return rows


def damage(folder: Path) -> None:
    """Cut every other file in half, as a full disk or a kill might."""
    for file in sorted(path for path in folder.rglob("*") if path.is_file())[::2]:
        os.truncate(file, file.stat().st_size // 2)


def ask(options: Options, cache: Path) -> float:
    """A first step in a process of its own, which keeps what it compiles in `cache`."""
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"), "TRITON_CACHE_DIR": str(cache / "triton")}
    words = ["--model", options.model, "--block-size", str(options.block_size)]
    words += [] if options.micro_batch is None else ["--micro-batch", str(options.micro_batch)]
    words += ["--compile"] if options.compile else []
    command = [sys.executable, __file__, *words, "--first-step", repr(time.time())]
    done = subprocess.run(command, env=os.environ | caches, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return float(done.stdout.splitlines()[-1])


def take_first_step(options: Options, started: float) -> float:
    """Seconds since `started` at the end of the first step."""
    from alternating import Clock
    from sides import homebrew_trainer, random_ids

    from homebrew import GPT, GPTConfig

    shape = GPTConfig.preset(options.model, block_size=options.block_size)
    settings = {"micro_batch_size": options.micro_batch, "compile": options.compile or "auto"}
    ids = random_ids(200 * shape.block_size, shape.vocab_size)
    ended = []

    class FirstStep(Clock):
        def tick(self) -> bool:
            last = super().tick()  # waits for the device at the first step
            ended.append(time.time())
            return last

    homebrew_trainer(GPT(shape), ids, **settings)(FirstStep(1, 1))
    return ended[0] - started


if __name__ == "__main__":
    main(tyro.cli(Options))
