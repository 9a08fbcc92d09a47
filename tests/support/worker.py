"""Training runs for the distributed tests, described by a JSON job.

A job names a layout and tasks; each task is one run of a Trainer. Rank 0 writes the results of all tasks to the job's
result file. Every rank writes the samples it has read to the task's folder.
"""

import contextlib
import errno
import hashlib
import json
import os
import resource
import signal
import sys
from collections import Counter
from datetime import timedelta
from functools import partialmethod
from pathlib import Path

import torch
import torch.distributed.checkpoint.state_dict
import torch.distributed.fsdp  # imported by a run with FSDP
from accelerate import PartialState
from accelerate.utils import DistributedType
from custom_optimizers import ScheduleFreeAdamW
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import Dataset

from homebrew import GPT, GPTConfig, Muon, SampleText, Trainer, TrainerConfig, get_tokenizer
from homebrew.callbacks.base import Callback
from homebrew.checkpoint.run_folder import RunLock
from homebrew.errors import TrainingError
from homebrew.model.lora import LoRAConfig, add_lora

VOCABULARY = 50


class Ragged(Dataset):
    """A dataset whose samples have from 0 to 16 scored targets; records which samples are read."""

    def __init__(self, breaks_at=None, stops_at=None):
        rows = torch.randint(0, VOCABULARY, (96, 17), generator=torch.Generator().manual_seed(3))
        self.input_ids, self.targets = rows[:, :-1].clone(), rows[:, 1:].clone()
        for i, row in enumerate(self.targets):
            row[: (i * 7) % 17] = -100
        self.read = []
        self.breaks_at, self.stops_at = breaks_at, stops_at

    def __len__(self):
        return len(self.input_ids)

    def __getitem__(self, i):
        self.read.append(i)
        if self.breaks_at is not None and len(self.read) > self.breaks_at:
            raise ValueError("this sample cannot be read")
        if len(self.read) == self.stops_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return self.input_ids[i], self.targets[i]


class RaggedRows(Ragged):
    """A dataset whose samples are dictionaries with from 1 to 16 tokens, without padding."""

    def __getitem__(self, i):
        input_ids, targets = super().__getitem__(i)
        length = 1 + (i * 5) % 16
        return {"input_ids": input_ids[:length].tolist(), "targets": targets[:length].numpy(), "text": "some text"}


class Recorder(Callback):
    """Records a run's metrics, and makes it fail where the task says so."""

    def __init__(self, task):
        self.task = task
        self.losses, self.evaluations = [], []

    def on_train_begin(self, trainer):
        self.set_trainable(trainer)
        if self.task.get("save_before_training"):
            trainer.save()
        if self.task.get("break") == "step" and trainer.accelerator.process_index == 1:
            weight = trainer.model.transformer.ln_f.bias

            def hook(_):
                if trainer.step == 2:
                    raise ValueError("this step cannot be taken")

            weight.register_hook(hook)

    def on_log(self, trainer, metrics):
        self.losses.append(metrics.loss)

    def set_trainable(self, trainer):
        """Freeze or unfreeze the position embedding, as the task's step and value say."""
        step, value = self.task.get("trainable", (None, None))
        if trainer.step == step:
            trainer.model.transformer.wpe.weight.requires_grad_(value)

    def on_step_end(self, trainer):
        self.set_trainable(trainer)
        trainer.should_stop = trainer.step == self.task.get("stop")
        rank_with_full_disk = {"save": 0, "part": 1}.get(self.task.get("break"))
        if trainer.step == 3 and trainer.accelerator.process_index == rank_with_full_disk:
            resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))
        last_save = trainer.step == trainer.config.max_steps and trainer.accelerator.process_index == 0
        if last_save and self.task.get("break", "").endswith("commit"):
            os.rename = no_space
        if trainer.step == 7 and trainer.accelerator.process_index == 1 and "signal" in self.task:
            os.kill(os.getpid(), getattr(signal, self.task["signal"]))

    def on_train_end(self, trainer):
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)  # the log must hold all tracebacks

    def on_evaluate(self, trainer, metrics):
        self.evaluations.append([metrics.loss, metrics.num_tokens])


class Poison(Callback):
    """Makes the loss or gradient of this rank's third step bad; records hashes of weights and optimizer state."""

    def __init__(self, where=None, value=0.0):
        self.where, self.value, self.losses, self.digests = where, float(value), 0, []

    def on_train_begin(self, trainer):
        def into_loss(module, inputs, loss):
            if trainer.step != 2:
                return loss
            self.losses += 1
            return loss + self.value if self.where == "loss" or self.losses == 2 else loss

        def into_gradient(module, inputs, output):
            if trainer.step == 2:
                output.register_hook(lambda gradient: gradient * self.value)

        if self.where == "gradient":
            trainer.model.transformer.h[1].register_forward_hook(into_gradient)
        elif self.where is not None:
            trainer.model.register_forward_hook(into_loss)

    def on_step_end(self, trainer):
        digest = hashlib.sha256()
        states = [state[key] for state in trainer.optimizer.state.values() for key in sorted(state)]
        for tensor in (*trainer.model.state_dict().values(), *states):
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            digest.update(local.contiguous().numpy().tobytes())
        self.digests.append(digest.hexdigest())


class CollectiveCounter(TorchDispatchMode):
    """Counts collective operations by name. Cheaper than the profiler, but not for compiled models."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if name.startswith("c10d::"):
            self.counts[name] += 1
        return function(*args, **kwargs or {})


class Untied(GPT):
    """A GPT with a separate weight for the head, and a buffer."""

    def __init__(self, config):
        super().__init__(config)
        self.lm_head.weight = nn.Parameter(self.lm_head.weight.detach().clone())
        self.register_buffer("num_calls", torch.zeros((), dtype=torch.int64))

    def forward(self, input_ids, targets=None):
        self.num_calls += 1
        return super().forward(input_ids, targets)


class RowRMS(torch.optim.Optimizer):
    """RMSprop with one value per row. For a sharded parameter, this state is a replicated DTensor."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 1e-2})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["rows"] = parameter.new_zeros(len(parameter), *[1] * (parameter.dim() - 1))
                square = parameter.grad.square()
                square = square.mean(-1, keepdim=True) if square.dim() > 1 else square
                state["rows"].mul_(0.9).add_(square, alpha=0.1)
                parameter.sub_(group["lr"] * parameter.grad / (state["rows"].sqrt() + 1e-8))


def several(parameters):
    """Return an optimizer of the matrices, one with state at once, and one with modes."""
    matrices, vectors = ([p for p in parameters if (p.dim() == 2) is is_matrix] for is_matrix in (True, False))
    return [
        Muon(matrices, lr=1e-2),
        torch.optim.Adagrad(vectors[:3], lr=1e-2, initial_accumulator_value=0.1),
        ScheduleFreeAdamW(vectors[3:]),
    ]


OPTIMIZERS = {"row_rms": RowRMS, "schedule_free": ScheduleFreeAdamW, "several": several}


def no_space(*_):
    """Fail as `os.rename` does on a full disk."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def limit_memory(model, max_sequences):
    """Make the model run out of memory with more sequences than `max_sequences`."""

    def hook(_, inputs):
        if len(inputs[0]) > max_sequences:
            raise torch.OutOfMemoryError

    model.register_forward_pre_hook(hook)


def kill_in_save(step):
    """Kill this process before the first file of this step's checkpoint is synced."""

    def fsync(descriptor, sync=os.fsync):
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if f".step-{step:08}.writing/" in str(path):
            os.kill(os.getpid(), signal.SIGKILL)
        sync(descriptor)

    os.fsync = fsync


def resume_after_interruption(trainer):
    """Interrupt the second step on every rank, resume with the same Trainer, and return the error message."""

    def hook(*_):
        if trainer.step == 1:
            raise InterruptedError

    handle = trainer.model.register_forward_hook(hook)
    with contextlib.suppress(InterruptedError):
        trainer.train()
    handle.remove()
    try:
        trainer.train(resume=True)
    except TrainingError as error:
        return str(error)


def build(task, rank):
    task = task | (task.get("rank_1", {}) if rank == 1 else {})
    broken = task.get("break") if rank == 1 else None
    dataset_class = RaggedRows if task.get("rows") else Ragged
    train = [] if broken == "startup" else dataset_class(breaks_at=40 + 1 if broken == "data" else None)
    recorder, poison = Recorder(task), Poison(**task.get("poison", {}) if rank == 1 else {})
    killed_rank, step = task.get("kill_in_save", (None, None))
    if rank == killed_rank:
        kill_in_save(step)
    if task.get("break") == "record":
        (Path(task["output_dir"]) / "run.json").mkdir(parents=True, exist_ok=True)
    if task.get("break") == "lock" and rank == 0:
        RunLock(Path(task["output_dir"])).acquire()
    shape = GPTConfig(
        block_size=16, vocab_size=VOCABULARY, n_layer=2, n_head=2, n_embd=16, dropout=task.get("dropout", 0.0)
    )
    model = Untied(shape) if task.get("untied") else GPT(shape)
    if task.get("compile"):  # AOTAutograd without Inductor, whose C++ compiler takes minutes
        nn.Module.compile = partialmethod(nn.Module.compile, backend="aot_eager")
    model.transformer.wpe.weight.requires_grad_(not task.get("frozen"))
    if task.get("lora"):
        add_lora(model, LoRAConfig(rank=3))
    if "memory" in task:
        limit_memory(model, task["memory"][rank])
    optimizer = task.get("optimizer")
    callbacks = [recorder, poison]
    if "sample_every" in task:
        train.tokenizer = get_tokenizer("bytes")
        callbacks.append(SampleText(every=task["sample_every"], prompts=["\t "], max_new_tokens=8))  # ids 9 and 32
    trainer = Trainer(
        model,
        train,
        dataset_class(
            breaks_at=1 if broken == "evaluation" else None,
            stops_at=task.get("stop_in_evaluation") if rank == 1 else None,
        ),
        config=TrainerConfig(
            output_dir=task["output_dir"] + (" elsewhere" if broken == "disk" else ""),
            max_steps=task.get("max_steps", 20),
            mixed_precision="no",
            global_batch_tokens=8 * 16,
            micro_batch_size=task.get("micro_batch_size", 2),
            optimizer="muon" if optimizer == "muon" else None,
            learning_rate=None if optimizer in OPTIMIZERS else 1e-2,
            ema_decay=task.get("ema_decay"),
            log_every=1,
            log_with=task.get("log_with"),
            save_every=task.get("save_every"),
            keep_every=task.get("save_every"),
            eval_every=task.get("eval_every"),
            gather_limit_bytes=task.get("gather_limit_bytes", 1 << 30),
            compile=task.get("compile", False),
            non_finite="skip" if "poison" in task else "raise",
            collective_timeout_seconds=task.get("timeout", 120),
        ),
        callbacks=callbacks,
        optimizer=OPTIMIZERS[optimizer](list(model.parameters())) if optimizer in OPTIMIZERS else None,
    )
    return trainer, train, recorder, poison


def run(task, rank):
    trainer, train, recorder, poison = build(task, rank)
    if task.get("profile"):
        with torch.profiler.profile() as profiler:
            trainer.train()
        names = Counter(event.name for event in profiler.events())
        counts = {name: count for name, count in names.items() if name.startswith("c10d::")}
        return {"collectives": counts, "micro_batch_size": trainer.batch.micro_batch_size}
    if task.get("again"):
        return {"error": resume_after_interruption(trainer)}
    if "stop" in task:
        trainer.train()
        trainer.evaluate()
    collectives = CollectiveCounter()
    with collectives if task.get("count_collectives") else contextlib.nullcontext():
        trainer.train(resume=task.get("resume", "stop" in task))
    folder = Path(task["output_dir"])
    (folder / f"read-{rank}.json").write_text(json.dumps(train.read))
    (folder / f"digests-{rank}.json").write_text(json.dumps(poison.digests))
    model = trainer.full_model()
    if trainer.is_main_process:
        weights = {name: value.clone() for name, value in model.state_dict().items() if name != "lm_head.weight"}
        save_file(weights, folder / "weights.safetensors")
    return {
        "micro_batch_size": trainer.batch.micro_batch_size,
        "losses": recorder.losses,
        "evaluations": recorder.evaluations,
        "processes": trainer.accelerator.num_processes,
        "kind": type(trainer._wrapped).__name__,
        "collectives": collectives.counts,
        "text": model.generate([[1, 2, 3]], 8, seed=1)[0],
    }


def shard(replicas, processes, timeout):
    """Request FSDP2 as a launcher would. Accelerate supports it on CPUs only if the state says MULTI_GPU."""
    PartialState(cpu=True, timeout=timedelta(seconds=timeout)).distributed_type = DistributedType.MULTI_GPU
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    if replicas > 1:
        os.environ |= {
            "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
            "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": str(replicas),
            "PARALLELISM_CONFIG_DP_SHARD_SIZE": str(processes // replicas),
        }


def work(job):
    rank = int(os.environ.get("RANK", "0"))
    if job["sharded"]:
        shard(job["replicas"], int(os.environ["WORLD_SIZE"]), next(iter(job["tasks"].values())).get("timeout", 120))
    results = {name: run(task, rank) for name, task in job["tasks"].items()}
    if rank == 0:
        Path(job["result"]).write_text(json.dumps(results))


if __name__ == "__main__":
    if sys.argv[1:]:
        work(json.loads(sys.argv[1]))
    else:
        from forking import serve  # imports what a launched process imports during its run

        serve(work)
