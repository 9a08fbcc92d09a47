"""Training runs of models that are not a GPT, for the distributed tests; described by a JSON job."""

import json
import os
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from forking import serve
from language_models import build_model
from safetensors.torch import save_file
from tiny_runs import Recorder, StopAt, UnevenTargets, make_trainer
from worker import shard

from homebrew.errors import HomebrewError


def run(task):
    recorder = Recorder()
    seed = task.get("seeds", (0, 0))[int(os.environ.get("RANK", "0"))]
    model = build_model(task["model"], seed=seed)
    for name in task.get("frozen", ()):
        model.get_submodule(name).requires_grad_(False)
    find_unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    trainer = make_trainer(
        task["output_dir"],
        model=model,
        train_dataset=UnevenTargets(),
        eval_dataset=UnevenTargets(),
        micro_batch_size=2,
        max_steps=10,
        keep_last=10,
        save_every=5,
        callbacks=[recorder, *([StopAt(task["stop"])] if "stop" in task else [])],
        accelerator=Accelerator(kwargs_handlers=[find_unused]) if task.get("find_unused") else None,
        progress=False,
        **task.get("config", {}),
    )
    trainer.train(resume=task.get("resume", False))
    trainer.save_pretrained(Path(task["output_dir"]) / "export")
    model = trainer.full_model()
    if trainer.is_main_process:
        weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        save_file(weights, Path(task["output_dir"]) / "weights.safetensors")
    return {
        "losses": list(recorder.losses.values()),
        "evaluation": [metrics.loss for metrics in recorder.evaluations.values()],
        "kind": type(trainer._wrapped).__name__,
    }


def work(job):
    if job["sharded"]:
        shard(1, int(os.environ["WORLD_SIZE"]), 120)
    results = {}
    for name, task in job["tasks"].items():
        try:
            results[name] = run(task)
        except HomebrewError as error:
            results[name] = {"error": f"{type(error).__name__}: {error}"}
    if os.environ.get("RANK", "0") == "0":
        Path(job["result"]).write_text(json.dumps(results))


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(work)
