"""One of `scaling.py`'s runs, told what to do by JSON; started by it under `accelerate launch`."""

import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from homebrew import GPTConfig, TokenDataset, Trainer, TrainerConfig
from homebrew.callbacks.base import Callback
from homebrew.metrics.step_metrics import StepMetrics

PROFILED_STEPS = 3
ON_GPU = torch.cuda.is_available()


class Stopwatch(Callback):
    """Times a stretch of steps, profiles a few more, and ends the run."""

    def __init__(self, warmup: int, steps: int) -> None:
        self.first, self.last = warmup, warmup + steps
        self.seconds = 0.0
        self.profiler = profile(activities=[ProfilerActivity.CUDA if ON_GPU else ProfilerActivity.CPU])

    def on_step_end(self, trainer: Trainer) -> None:
        """Start and stop the clocks."""
        if trainer.step in (self.first, self.last, self.last + PROFILED_STEPS):
            if ON_GPU:
                torch.cuda.synchronize()
            now = time.perf_counter()
        if trainer.step == self.first:
            self.began = now
        elif trainer.step == self.last:
            self.seconds = now - self.began
            self.profiler.start()
            self.began = time.perf_counter()
        elif trainer.step == self.last + PROFILED_STEPS:
            self.profiled_seconds = now - self.began
            self.profiler.stop()
            trainer.should_stop = True


class Losses(Callback):
    """Every step's loss, and the end of the run after some step."""

    def __init__(self, until: int | None = None) -> None:
        self.losses: list[float] = []
        self.until = until

    def on_log(self, trainer: Trainer, metrics: StepMetrics) -> None:
        """Keep the loss."""
        self.losses.append(metrics.loss)

    def on_step_end(self, trainer: Trainer) -> None:
        """Stop where the run is to be cut."""
        trainer.should_stop = trainer.step == self.until


def in_collectives(watch: Stopwatch) -> tuple[float, float | None]:
    """Shares of the profiled time in which a collective ran, and in which nothing else ran beside it."""
    wanted = DeviceType.CUDA if ON_GPU else DeviceType.CPU
    spans: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for event in watch.profiler.events() or []:
        if event.device_type == wanted:
            name = event.name.lower()
            collective = "nccl" in name if ON_GPU else name.startswith("gloo:")
            spans[collective].append((event.time_range.start, event.time_range.end))
    busy, others = covered(spans[True]), covered(spans[False])
    exposed = covered(spans[True] + spans[False]) - others
    whole = watch.profiled_seconds * 1e6
    return busy / whole, exposed / whole if ON_GPU else None


def covered(spans: list[tuple[float, float]]) -> float:
    """The length of the intervals' union."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def trainer_of(task: dict[str, Any], callback: Callback, folder: str, **settings: Any) -> Trainer:
    shape = GPTConfig.preset(task["model"], block_size=task["block_size"])
    ids = torch.randint(shape.vocab_size, (8 * task["tokens"] + 1,), generator=torch.Generator().manual_seed(0))
    return Trainer(
        shape,
        TokenDataset.from_tokens(ids, shape.block_size, vocab_size=shape.vocab_size),
        config=TrainerConfig(
            output_dir=Path(task["folder"]) / folder,
            global_batch_tokens=task["tokens"],
            micro_batch_size=task["micro_batch"],
            **settings,
        ),
        callbacks=[callback],
    )


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Speed, memory and the time in collectives, of the slowest and fullest process."""
    watch = Stopwatch(task["warmup"], task["steps"])
    never = 10**6  # nothing is reported, evaluated or saved within the stretch
    trainer = trainer_of(task, watch, "run", max_steps=never, log_every=never, warmup_steps=10)
    trainer.train()
    collectives, exposed = in_collectives(watch)
    peak = float(torch.cuda.max_memory_allocated()) if ON_GPU else 0.0
    mine = torch.tensor([[watch.seconds, peak]], device=trainer.accelerator.device)
    seconds, peak = trainer.accelerator.gather(mine).amax(0).tolist()
    return {
        "tokens_per_second": task["tokens"] * task["steps"] / seconds,
        "peak_bytes": peak if ON_GPU else None,
        "collectives": collectives,
        "exposed": exposed,
        "micro_batches": trainer.batch.accumulation_steps,
    }


def losses(task: dict[str, Any], *, resume: bool) -> dict[str, Any]:
    """A run's losses and the hash of its weights; in one go, or in two Trainers with a checkpoint between them."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # without which the next line makes its products errors
    torch.use_deterministic_algorithms(mode=True)  # a GPU's fastest kernels differ from run to run
    middle = task["steps"] // 2
    settings = {"max_steps": task["steps"], "log_every": 1, "save_every": middle, **task["settings"]}
    before, after = Losses(until=middle), Losses()
    if resume:
        trainer_of(task, before, "run", **settings).train()
    trainer = trainer_of(task, after, "run", **settings)
    trainer.train(resume=resume)
    digest = hashlib.sha256()
    for tensor in trainer.full_model().state_dict().values():
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return {"losses": before.losses + after.losses, "weights": digest.hexdigest()}


def main() -> None:
    task = json.loads(sys.argv[1])
    found = measure(task) if task["mode"] == "measure" else losses(task, resume=task["mode"] == "resume")
    if torch.distributed.is_initialized():
        rank = torch.distributed.get_rank()
        torch.distributed.destroy_process_group()
    else:
        rank = 0
    if rank == 0:
        Path(task["result"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
