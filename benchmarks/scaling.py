"""How training scales over the GPUs of one machine: DDP and FSDP2, each against one GPU measured in the same call.

python benchmarks/scaling.py                 # GPT-2 small and medium over 1, 2, 4 and 8 GPUs, as many as there are
python benchmarks/scaling.py --models gpt2 --processes 1 --rounds 3   # what each costs on one GPU, with one process
python benchmarks/scaling.py --check         # and the losses of 1 and 2 GPUs, and resumed runs on 2
python benchmarks/scaling.py --cpu           # a baby model over 1 and 2 CPU processes: whether the script works
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

WORKER = Path(__file__).with_name("scaling_worker.py")


@dataclass
class Options:
    """Measure tokens a second, memory and the time in collectives over several GPUs."""

    models: tuple[str, ...] = ("gpt2", "gpt2-medium")
    """Presets."""
    processes: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of GPUs; those the machine does not have are left out, and said so."""
    strategies: tuple[str, ...] = ("ddp", "fsdp2")
    """Over every number of processes; over one also none, which all others are compared with."""
    tokens: int = 524_288
    """In a step."""
    micro_batch: int = 32
    """Sequences at once, the same for all numbers of GPUs."""
    block_size: int = 1024
    """Tokens in a sequence."""
    warmup: int = 10
    """Steps before the clock starts."""
    steps: int = 20
    """Timed steps."""
    rounds: int = 1
    """Launches of each, in turns, every other round backwards; 0 for the check alone."""
    check: bool = False
    """Also compare the losses of 1 and 2 processes over 50 steps, and of resumed runs with unbroken ones, all by
    deterministic kernels."""
    cpu: bool = False
    """A baby model over gloo instead, DDP only: the figures mean nothing."""
    json: Path | None = None
    """A file to write the figures to."""


def main(options: Options) -> None:
    if options.cpu:
        options.models, options.processes, options.strategies = ("baby",), (1, 2), ("ddp",)
        options.tokens, options.block_size, options.micro_batch, options.warmup, options.steps = 1_024, 64, 2, 2, 3
    present = 2 if options.cpu else torch.cuda.device_count()
    counts = [count for count in options.processes if count <= present]
    if left_out := sorted(set(options.processes) - set(counts)):
        print(f"This machine has {present} GPUs; left out: {', '.join(map(str, left_out))}.")
    if not counts:
        raise SystemExit("There is nothing to measure here: use --cpu to see whether the script works.")
    device = "CPU" if options.cpu else torch.cuda.get_device_name(0)
    print(f"{device}, PyTorch {torch.__version__}, {options.tokens:,} tokens a step, NCCL_NVLS_ENABLE=0\n")
    found: list[dict[str, Any]] = []
    for model in options.models if options.rounds else ():
        runs: list[dict[str, Any]] = []
        wanted = layouts(options.strategies, counts)
        for turn in range(options.rounds):
            for strategy, count in wanted if turn % 2 == 0 else reversed(wanted):
                row = {"model": model, "strategy": strategy, "processes": count, "round": turn}
                runs.append(row | launch(options, strategy, count, {"mode": "measure", "model": model}))
                print(f"round {turn}: {strategy} × {count}: {runs[-1]['tokens_per_second']:,.0f}", file=sys.stderr)
        print("\n".join([f"### {model}", "", HEADER, *table(runs, wanted), ""]), flush=True)
        found += runs
    facts: dict[str, Any] = {"device": device, "torch": torch.__version__, "rows": found}
    if options.check and 2 in counts:
        facts["check"] = {}
        for name, value in check(options):
            facts["check"][name] = value
            print(f"{name}: {value}", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(facts, indent=2) + "\n")


HEADER = """\
| wrapper | processes | tokens/s | efficiency | peak GiB | in collectives | of that, not hidden |
|---|---|---|---|---|---|---|"""


def table(runs: list[dict[str, Any]], wanted: list[tuple[str, int]]) -> list[str]:
    """A row for each layout: its run of middle speed, and the median efficiency against its round's first layout."""
    speeds = {(run["round"], run["strategy"], run["processes"]): run["tokens_per_second"] for run in runs}
    rows = []
    for layout in wanted:
        own = [run for run in runs if (run["strategy"], run["processes"]) == layout]
        middle = sorted(own, key=lambda run: run["tokens_per_second"])[len(own) // 2]
        ratios = [run["tokens_per_second"] / speeds[run["round"], *wanted[0]] / run["processes"] for run in own]
        memory = "n/a" if middle["peak_bytes"] is None else f"{middle['peak_bytes'] / 2**30:.1f}"
        hidden = "n/a" if middle["exposed"] is None else f"{middle['exposed']:.1%}"
        cells = [*layout, f"{middle['tokens_per_second']:,.0f}", f"{statistics.median(ratios):.3f}", memory]
        rows.append("| " + " | ".join(map(str, [*cells, f"{middle['collectives']:.1%}", hidden])) + " |")
    return rows


def layouts(strategies: tuple[str, ...], counts: list[int]) -> list[tuple[str, int]]:
    """One process without a wrapper first: what all others are compared with."""
    return [("none", 1)] + [(strategy, count) for strategy in strategies for count in counts]


def launch(options: Options, strategy: str, processes: int, task: dict[str, Any]) -> dict[str, Any]:
    """Run the worker under `accelerate launch`; what its first process found."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        facts = ("tokens", "micro_batch", "block_size", "warmup", "steps")
        task = {name: getattr(options, name) for name in facts} | {"folder": folder, "result": str(result)} | task
        command = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1"]
        command += ["--main_process_port", "0", "--num_processes", str(processes)]
        precision = "no" if options.cpu else "bf16"
        command += ["--mixed_precision", precision, "--dynamo_backend", "no"]
        if (strategy, processes) == ("ddp", 1):  # `accelerate launch` would start it without
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        elif strategy == "fsdp2":
            command += ["--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]
            command += ["--fsdp_transformer_layer_cls_to_wrap", "Block", "--fsdp_cpu_ram_efficient_loading", "false"]
        elif processes > 1:
            command += ["--multi_gpu"]
        # NVLink multicast needs rights that containers often lack, and then NCCL fails at the first collective.
        environment = os.environ | {"NCCL_NVLS_ENABLE": "0", "ACCELERATE_MIXED_PRECISION": precision}
        environment |= {"ACCELERATE_USE_CPU": "true"} if options.cpu else {}
        done = subprocess.run(
            [*command, str(WORKER), json.dumps(task)], env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"{strategy} over {processes} failed:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
        found: dict[str, Any] = json.loads(result.read_text())
        return found


def check(options: Options) -> Iterator[tuple[str, Any]]:
    """The losses of one and of two processes, and of runs that were resumed on two, by every way to save."""
    model, steps = options.models[0], 4 if options.cpu else 50
    task = {"mode": "losses", "model": model, "steps": steps, "settings": {}}
    one = launch(options, "none", 1, task)
    yield f"last of {steps} losses, 1 process", one["losses"][-1]
    for strategy in options.strategies:
        two = launch(options, strategy, 2, task)
        name = f"{strategy} over 2"
        yield f"{name}, last loss", two["losses"][-1]
        differences = [abs(a - b) for a, b in zip(one["losses"], two["losses"], strict=True)]
        yield f"{name}, largest difference from 1 process", max(differences)
        saves = {"": {}} if strategy == "ddp" else {"": {}, ", saved by all processes": {"gather_limit_bytes": 0}}
        for how, settings in saves.items():
            resumed = launch(options, strategy, 2, task | {"mode": "resume", "settings": settings})
            for part in ("losses", "weights"):
                yield f"{name}, resumed in the middle{how}, {part} bitwise equal", resumed[part] == two[part]


if __name__ == "__main__":
    main(tyro.cli(Options))
