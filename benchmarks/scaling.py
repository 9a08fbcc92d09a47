"""Scaling over the GPUs of one machine: DDP and FSDP2, compared with one GPU measured in the same call.

python benchmarks/scaling.py                 # GPT-2 small and medium on 1, 2, 4 and 8 GPUs, as available
python benchmarks/scaling.py --models gpt2 --processes 1 --rounds 3   # overhead of DDP and FSDP2 on one GPU
python benchmarks/scaling.py --check         # also compare losses of 1 and 2 GPUs, and resumed runs
python benchmarks/scaling.py --cpu           # a tiny run on 1 and 2 CPU processes, to test the script
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from command_line import run_script
from harness import GIB, Report, RoundOptions

WORKER = Path(__file__).with_name("scaling_worker.py")

BASELINE = ("none", 1)
"""Strategy and number of processes that the others are compared with."""

CHECKS: dict[str, tuple[str, dict[str, int]]] = {
    "ddp": ("ddp", {}),
    "fsdp2": ("fsdp2", {}),
    "fsdp2, saved by all ranks": ("fsdp2", {"gather_limit_bytes": 0}),
}
"""Strategy and settings of each comparison of two processes with one."""


@dataclass
class Options(RoundOptions):
    """Measure tokens/s, memory and the time in collectives on several GPUs."""

    models: tuple[str, ...] = ("gpt2", "gpt2-medium")
    """Model presets."""
    processes: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of GPUs. Numbers that are not available are skipped with a message."""
    strategies: tuple[str, ...] = ("ddp", "fsdp2")
    """Strategies to run on each number of processes: "ddp", "fsdp2", or "none", independent processes that show what
    the GPUs reach without communication. The baseline is one process without a wrapper."""
    tokens: int = 524_288
    """Tokens per step."""
    micro_batch: int = 32
    """Micro-batch size per GPU."""
    block_size: int = 1024
    """Tokens per sequence."""
    warmup: int = 10
    steps: int = 20
    rounds: int = 1
    """Launches per layout, interleaved, every second round in reverse order. 0 runs only the check."""
    check: bool = False
    """Also compare losses over 50 steps, with deterministic kernels: 2 processes with 1, and runs that are resumed, on
    the same or the other number of processes, with uninterrupted ones."""
    cpu: bool = False
    """Run a tiny model on CPUs, independently and with DDP, to test the script. The results are not meaningful."""


def main(options: Options) -> None:
    if options.cpu:
        options.models, options.processes, options.strategies = ("baby",), (1, 2), ("none", "ddp")
        options.tokens, options.block_size, options.micro_batch, options.warmup, options.steps = 1_024, 64, 2, 2, 3
    available = 2 if options.cpu else torch.cuda.device_count()
    counts = [count for count in options.processes if count <= available]
    if unavailable := sorted(set(options.processes) - set(counts)):
        print(f"This machine has {available} GPUs. Skipped: {', '.join(map(str, unavailable))}.")
    if not counts:
        raise SystemExit("No GPU is available. Use --cpu to test the script.")
    if options.check and available < 2:
        raise SystemExit("--check needs two GPUs, but one is available.")
    report = Report(options.json, {"NCCL_NVLS_ENABLE": 0})
    others = [(strategy, count) for strategy in options.strategies for count in counts]
    layouts = list(dict.fromkeys([BASELINE, *others]))  # the others may include the baseline
    for model in options.models if options.rounds else ():
        runs: list[dict[str, Any]] = []
        for turn in range(options.rounds):
            for strategy, count in layouts if turn % 2 == 0 else reversed(layouts):
                row = {"model": model, "strategy": strategy, "processes": count, "round": turn}
                runs.append(row | measure(options, strategy, count, model))
                print(runs[-1], file=sys.stderr)
        report.add(f"{model}: {options.tokens:,} tokens per step", [row_of(layout, runs) for layout in layouts])
        report.raw += runs
    if options.check:
        for name, value in check(options):
            report.metadata[name] = value
            print(f"{name}: {value}", file=sys.stderr)
    report.finish()


def row_of(layout: tuple[str, int], runs: list[dict[str, Any]]) -> dict[str, str]:
    """Return the table row of a layout: its median run, and its median efficiency relative to one process."""
    baselines = {run["round"]: run["tokens_per_second"] for run in runs if layout_of(run) == BASELINE}
    layout_runs = [run for run in runs if layout_of(run) == layout]
    run = sorted(layout_runs, key=lambda run: run["tokens_per_second"])[len(layout_runs) // 2]
    efficiency = statistics.median(run["tokens_per_second"] / baselines[run["round"]] for run in layout_runs)
    return {
        "strategy": layout[0],
        "processes": str(layout[1]),
        "tokens/s": f"{run['tokens_per_second']:,.0f}",
        "efficiency": f"{efficiency / layout[1]:.3f}",
        "peak GiB": "n/a" if run["peak_bytes"] is None else f"{run['peak_bytes'] / GIB:.1f}",
        "in collectives": f"{run['collectives']:.1%}",
        "not overlapped": "n/a" if run["exposed"] is None else f"{run['exposed']:.1%}",
    }


def layout_of(run: dict[str, Any]) -> tuple[str, int]:
    """Return the strategy and the number of processes of a run."""
    return run["strategy"], run["processes"]


def measure(options: Options, strategy: str, processes: int, model: str) -> dict[str, Any]:
    """Measure throughput, memory and time in collectives.

    Independent processes start at the same time, each with its share of the tokens. The slowest determines the result.
    """
    task = {"mode": "measure", "model": model}
    if strategy != "none":
        return launch(options, strategy, processes, task)
    share = replace(options, tokens=options.tokens // processes)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(processes)))  # empty with --cpu
    devices = visible.split(",")[:processes]
    with ThreadPoolExecutor(processes) as pool:
        runs = list(pool.map(lambda device: launch(share, strategy, 1, task, device=device), devices))
    slowest = min(runs, key=lambda run: run["tokens_per_second"])
    return slowest | {"tokens_per_second": processes * slowest["tokens_per_second"]}


def launch(
    options: Options, strategy: str, processes: int, task: dict[str, Any], *, device: str | None = None
) -> dict[str, Any]:
    """Run the worker under `accelerate launch`, on all GPUs or a given one, and return the results of rank 0."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        names = ("tokens", "micro_batch", "block_size", "warmup", "steps")
        task = {name: getattr(options, name) for name in names} | {"folder": folder, "result": str(result)} | task
        command = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1"]
        command += ["--main_process_port", "0", "--num_processes", str(processes)]
        precision = "no" if options.cpu else "bf16"
        command += ["--mixed_precision", precision, "--dynamo_backend", "no"]
        if (strategy, processes) == ("ddp", 1):  # `accelerate launch` does not initialize DDP for one process
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        elif strategy == "fsdp2":
            command += ["--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]
            command += ["--fsdp_transformer_layer_cls_to_wrap", "Block", "--fsdp_cpu_ram_efficient_loading", "false"]
        elif processes > 1:
            command += ["--multi_gpu"]
        # NVLink multicast needs permissions that containers often lack; NCCL then fails at the first collective.
        environment = os.environ | {"NCCL_NVLS_ENABLE": "0", "ACCELERATE_MIXED_PRECISION": precision}
        environment |= {"ACCELERATE_USE_CPU": "true"} if options.cpu else {}
        environment |= {"CUDA_VISIBLE_DEVICES": device} if device is not None else {}
        process = subprocess.run(
            [*command, str(WORKER), json.dumps(task)], env=environment, capture_output=True, text=True, check=False
        )
        if process.returncode:
            raise SystemExit(
                f"{strategy} on {processes} processes failed:\n{process.stdout[-2000:]}\n{process.stderr[-6000:]}"
            )
        results: dict[str, Any] = json.loads(result.read_text())
        return results


def check(options: Options) -> Iterator[tuple[str, Any]]:
    """Compare two processes with one, and resumed runs with uninterrupted ones. Yield a name and a value for each."""
    steps = 4 if options.cpu else 50
    halfway = steps // 2
    task = {"mode": "losses", "model": options.models[0], "steps": steps, "settings": {}}
    uninterrupted = {"name": "uninterrupted"}
    checkpoint = Path("uninterrupted", "checkpoints", f"step-{halfway:08d}")
    with tempfile.TemporaryDirectory() as folder:
        folder_of_one = Path(folder, "one")
        one = launch(options, *BASELINE, task | {"folder": str(folder_of_one), "runs": [uninterrupted]})
        losses_of_one = one["uninterrupted"]["losses"]
        yield f"loss after {steps} steps, 1 process", losses_of_one[-1]
        for name, (strategy, settings) in CHECKS.items():
            if strategy not in options.strategies:
                continue
            folder_of_two, on_two = Path(folder, name), f"{name} on 2 processes"
            runs = [
                uninterrupted,
                {"name": "resumed", "stop_after": halfway},
                {"name": "resumed", "resume": True},
                {"name": "resumed from one", "resume": str(folder_of_one / checkpoint)},
            ]
            two = launch(
                options, strategy, 2, task | {"folder": str(folder_of_two), "runs": runs, "settings": settings}
            )
            losses_of_two = two["uninterrupted"]["losses"]
            yield f"{on_two}, largest difference to 1 process", largest_difference(losses_of_two, losses_of_one)
            for part in ("losses", "weights"):
                is_equal = two["resumed"][part] == two["uninterrupted"][part]
                yield f"{on_two}, resumed halfway, {part} bitwise equal", is_equal
            difference = largest_difference(two["resumed from one"]["losses"], losses_of_one[halfway:])
            yield f"{on_two}, resumed from 1 process, largest difference to 1 process", difference
            runs = [{"name": "resumed from two", "resume": str(folder_of_two / checkpoint)}]
            one = launch(options, *BASELINE, task | {"runs": runs})
            difference = largest_difference(one["resumed from two"]["losses"], losses_of_two[halfway:])
            yield f"1 process, resumed from {on_two}, largest difference to 2 processes", difference


def largest_difference(losses: list[float], others: list[float]) -> float:
    """Return the largest absolute difference of two runs' losses."""
    return max(abs(a - b) for a, b in zip(losses, others, strict=True))


if __name__ == "__main__":
    run_script(main, Options)
