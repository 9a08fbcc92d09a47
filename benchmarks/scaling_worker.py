"""Worker of `scaling.py`. It is started by `accelerate launch` with a task as JSON."""

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from harness import ON_GPU, StepTimer
from implementations import random_ids
from profile_step import ProfiledTimer
from torch.autograd import DeviceType

from homebrew import Callback, GPTConfig, StepMetrics, TokenDataset, Trainer, TrainerConfig

PROFILED_STEPS = 3


class RunTimers(Callback):
    """Runs one timer after the other, then stops the run."""

    def __init__(self, *timers: StepTimer) -> None:
        self.timers = list(timers)

    def on_step_end(self, trainer: Trainer) -> None:
        """Count the step. Several ranks agree to stop one step later."""
        if self.timers and self.timers[0].tick():
            self.timers.pop(0)
        trainer.should_stop = not self.timers


class LossRecorder(Callback):
    """Records the loss of each step, and stops the run after a given step."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.losses: list[float] = []
        self.stop_after = stop_after

    def on_log(self, trainer: Trainer, metrics: StepMetrics) -> None:
        """Record the loss."""
        self.losses.append(metrics.loss)

    def on_step_end(self, trainer: Trainer) -> None:
        """Stop after the given step."""
        trainer.should_stop = trainer.step == self.stop_after


def collective_shares(timer: ProfiledTimer) -> tuple[float, float | None]:
    """Return the share of the profiled time in collectives, and the share not overlapped with computation."""
    device_type = DeviceType.CUDA if ON_GPU else DeviceType.CPU
    spans: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for event in timer.profile.events() or []:
        if event.device_type == device_type:
            name = event.name.lower()
            is_collective = "nccl" in name if ON_GPU else name.startswith("gloo:")
            spans[is_collective].append((event.time_range.start, event.time_range.end))
    collective, compute = union_length(spans[True]), union_length(spans[False])
    exposed = union_length(spans[True] + spans[False]) - compute
    total = timer.seconds * timer.steps * 1e6
    return collective / total, exposed / total if ON_GPU else None


def union_length(spans: list[tuple[float, float]]) -> float:
    """Return the total length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def build_trainer(task: dict[str, Any], callback: Callback, folder: str, **settings: Any) -> Trainer:
    config = GPTConfig.preset(task["model"], block_size=task["block_size"])
    ids = random_ids(8 * task["tokens"] + 1, config.vocab_size)
    dataset = TokenDataset.from_tokens(ids, config.block_size, vocab_size=config.vocab_size)
    batch = {"global_batch_tokens": task["tokens"], "micro_batch_size": task["micro_batch"]}
    trainer_config = TrainerConfig(output_dir=Path(task["folder"]) / folder, **batch, **settings)
    return Trainer(config, dataset, config=trainer_config, callbacks=[callback])


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Measure throughput, memory and time in collectives. Time and memory are the maximum over ranks."""
    timer, profiled = StepTimer(task["warmup"], task["steps"]), ProfiledTimer(PROFILED_STEPS)
    never = 10**6  # no logging, evaluation or checkpoint while steps are timed
    trainer = build_trainer(task, RunTimers(timer, profiled), "run", max_steps=never, log_every=never, warmup_steps=10)
    trainer.train()
    collectives, exposed = collective_shares(profiled)
    peak = float(torch.cuda.max_memory_allocated()) if ON_GPU else 0.0
    local = torch.tensor([[timer.seconds, peak]], device=trainer.accelerator.device)
    seconds, peak = trainer.accelerator.gather(local).amax(0).tolist()
    return {
        "tokens_per_second": task["tokens"] / seconds,
        "peak_bytes": peak if ON_GPU else None,
        "collectives": collectives,
        "exposed": exposed,
        "micro_batches": trainer.batch.accumulation_steps,
    }


def losses(task: dict[str, Any]) -> dict[str, Any]:
    """Train the task's runs, each with its own Trainer; return losses and a hash of the weights by name.

    A run has a `name`, which is that of its folder, and optionally `stop_after`, a step, and `resume`, as in
    `Trainer.train`. The losses of a run that resumes one of the same name are appended to those of the earlier run.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # required for deterministic matrix products
    torch.use_deterministic_algorithms(mode=True)  # the default kernels are not deterministic
    settings = {"max_steps": task["steps"], "log_every": 1, "save_every": task["steps"] // 2, **task["settings"]}
    results: dict[str, Any] = {}
    for run in task["runs"]:
        recorder = LossRecorder(run.get("stop_after"))
        trainer = build_trainer(task, recorder, run["name"], **settings)
        trainer.train(resume=run.get("resume", False))
        result = results.setdefault(run["name"], {"losses": []})
        result["losses"] += recorder.losses
        result["weights"] = hash_of_weights(trainer)
    return results


def hash_of_weights(trainer: Trainer) -> str:
    """Return the SHA-256 of the gathered weights."""
    digest = hashlib.sha256()
    for tensor in trainer.full_model().state_dict().values():
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def main() -> None:
    task = json.loads(sys.argv[1])
    results = measure(task) if task["mode"] == "measure" else losses(task)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if os.environ.get("RANK", "0") == "0":
        Path(task["result"]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
