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
import tyro
from harness import GIB, Report, RoundOptions

WORKER = Path(__file__).with_name("scaling_worker.py")


@dataclass
class Options(RoundOptions):
    """Measure tokens/s, memory and the time in collectives on several GPUs."""

    models: tuple[str, ...] = ("gpt2", "gpt2-medium")
    """Model presets."""
    processes: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of GPUs. Numbers that are not available are skipped with a message."""
    strategies: tuple[str, ...] = ("ddp", "fsdp2")
    """Strategies to run on each number of processes: "ddp", "fsdp2", or "none" for independent processes, each with its
    share of the tokens, which show what the GPUs can reach. The baseline is one process without a wrapper."""
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
    """Also compare losses of 1 and 2 processes over 50 steps, and of resumed with uninterrupted runs, also on the other
    number of processes, all with deterministic kernels."""
    cpu: bool = False
    """Run a tiny model on CPUs with gloo and DDP, to test the script. The results are not meaningful."""


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
    report = Report(options.json, {"NCCL_NVLS_ENABLE": 0})
    all_layouts = [("none", 1), *((strategy, count) for strategy in options.strategies for count in counts)]
    all_layouts = list(dict.fromkeys(all_layouts))
    for model in options.models if options.rounds else ():
        runs: list[dict[str, Any]] = []
        for turn in range(options.rounds):
            for strategy, count in all_layouts if turn % 2 == 0 else reversed(all_layouts):
                row = {"model": model, "strategy": strategy, "processes": count, "round": turn}
                runs.append(row | measure(options, strategy, count, model))
                print(runs[-1], file=sys.stderr)
        report.add(f"{model}: {options.tokens:,} tokens per step", [row_of(layout, runs) for layout in all_layouts])
        report.raw += runs
    if options.check and 2 in counts:
        for name, value in check(options):
            report.metadata[name] = value
            print(f"{name}: {value}", file=sys.stderr)
    report.finish()


def row_of(layout: tuple[str, int], runs: list[dict[str, Any]]) -> dict[str, str]:
    """Return the table row of a layout: its median run, and its median efficiency relative to one process."""
    baseline_runs, layout_runs = (
        [run for run in runs if (run["strategy"], run["processes"]) == each] for each in (("none", 1), layout)
    )
    baselines = {run["round"]: run["tokens_per_second"] for run in baseline_runs}
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


def measure(options: Options, strategy: str, processes: int, model: str) -> dict[str, Any]:
    """Measure throughput and memory. Independent processes run at the same time, and all count as the slowest."""
    task = {"mode": "measure", "model": model}
    if strategy != "none":
        return launch(options, strategy, processes, task)
    share = replace(options, tokens=options.tokens // processes)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(processes)))).split(",")
    with ThreadPoolExecutor(processes) as pool:
        runs = list(pool.map(lambda device: launch(share, strategy, 1, task, device=device), visible[:processes]))
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
    """Compare losses of one and two processes, and of resumed runs, also on another number of processes, with these."""
    steps = 4 if options.cpu else 50
    task = {"mode": "losses", "model": options.models[0], "steps": steps, "settings": {}}
    whole, first = {"name": "whole"}, {"name": "resumed", "stop_after": steps // 2}
    halfway = Path("whole", "checkpoints", f"step-{steps // 2:08d}")
    with tempfile.TemporaryDirectory() as folder:
        of_one = Path(folder, "one")
        one = launch(options, "none", 1, task | {"runs": [whole], "folder": str(of_one)})["whole"]["losses"]
        yield f"loss after {steps} steps, 1 process", one[-1]
        for strategy in (each for each in options.strategies if each != "none"):
            saves = {"": {}} if strategy == "ddp" else {"": {}, ", saved by all ranks": {"gather_limit_bytes": 0}}
            for how, settings in saves.items():
                of_two, name = Path(folder, strategy + how), f"{strategy} on 2 processes{how}"
                runs = [whole, first, {"name": "resumed", "resume": True}]
                runs += [{"name": "resumed from 1 process", "resume": str(of_one / halfway)}]
                two = launch(options, strategy, 2, task | {"runs": runs, "folder": str(of_two), "settings": settings})
                yield f"{name}, largest difference to 1 process", largest_difference(two["whole"]["losses"], one)
                for part in ("losses", "weights"):
                    yield f"{name}, resumed halfway, {part} bitwise equal", two["resumed"][part] == two["whole"][part]
                resumed = two["resumed from 1 process"]["losses"]
                yield f"{name}, resumed from 1, largest difference", largest_difference(resumed, one[steps // 2 :])
                runs = [{"name": "resumed", "resume": str(of_two / halfway)}]
                resumed = launch(options, "none", 1, task | {"runs": runs})["resumed"]["losses"]
                yield (
                    f"1 process, resumed from {name}, largest difference",
                    largest_difference(resumed, two["whole"]["losses"][steps // 2 :]),
                )


def largest_difference(losses: list[float], others: list[float]) -> float:
    """Return the largest absolute difference of two runs' losses."""
    return max(abs(a - b) for a, b in zip(losses, others, strict=True))


if __name__ == "__main__":
    main(tyro.cli(Options))
