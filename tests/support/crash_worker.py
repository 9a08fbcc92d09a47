"""Runs that are struck; not a test.

A job is a run's settings, and when what strikes which of its processes. The first process tells what was left.
"""

import gc
import itertools
import json
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import torch
from forking import serve

from homebrew import GPTConfig, TokenDataset, Trainer, TrainerConfig
from homebrew.callbacks.base import Callback
from homebrew.distributed.signals import HANDLED_SIGNALS

TEXT = "It is a truth universally acknowledged, that a single man in possession of a good fortune\n" * 30
SETTINGS = {
    "global_batch_tokens": 8 * 16,
    "micro_batch_size": 4,
    "learning_rate": 1e-2,
    "log_every": 5,
    "eval_batches": 2,
    "compile": False,
    "mixed_precision": "no",
}
OPERATIONS = ("mkdir", "open", "write", "fsync", "close", "rename", "unlink", "rmdir")


class Samples:
    """A dataset that tells when it is read, may take its time, and may change what it gives by chance."""

    def __init__(self, tell, slow=0.0, noisy=False):
        self.slow, self.noisy = slow, noisy
        self.dataset, self.tell = TokenDataset.from_text(TEXT, block_size=16, tokenizer="bytes"), tell
        self.fingerprint = self.dataset.fingerprint

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        self.tell()
        time.sleep(self.slow)
        input_ids, targets = self.dataset[i]
        return input_ids, torch.where(torch.rand(16) < 0.2, -100, targets) if self.noisy else targets


class Strike(Callback):
    """Sends this process signals at a moment of its run: "step", "backward", "data", "evaluation" or "save"."""

    def __init__(self, signals=(), where=None, step=0, delay=0.0, operation=0, note=None, workers=False):
        self.note = note  # a file to say in whether a save was going on
        self.workers = workers  # whether the loader's are struck too, as by Ctrl-C and by many schedulers
        self.signals, self.where, self.at, self.delay, self.operation = signals, where, step, delay, operation
        self.step = self.sent = None
        if where == "save":
            self.watch_writer()

    def strike(self):
        if self.sent is None:
            self.sent = time.monotonic()
            if self.note is not None:
                saving = any(thread.name.startswith("checkpoint-") for thread in threading.enumerate())
                Path(self.note).write_text(json.dumps({"saving": saving}))
            workers = [worker.pid for worker in multiprocessing.active_children()] if self.workers else []
            for name in self.signals:
                for process in (*workers, os.getpid()):
                    os.kill(process, getattr(signal, name))

    def moment(self, where):
        if where == self.where and self.step == self.at:
            self.strike()

    def on_train_begin(self, trainer):
        self.step = trainer.step
        trainer.model.transformer.ln_f.bias.register_hook(lambda _: self.moment("backward"))

    def on_step_end(self, trainer):
        self.step = trainer.step
        if self.where == "step" and self.step == self.at:
            threading.Timer(self.delay, self.strike).start()
        if self.where == "save" and self.step > self.at + 2:
            self.strike()  # the save had fewer operations

    def watch_writer(self):
        """Strike at an operation of the writer, before or after it."""
        moments = itertools.count()

        def watched(function):
            def call(*args, **kwargs):
                self.count(moments)
                result = function(*args, **kwargs)
                self.count(moments)
                return result

            return call

        for name in OPERATIONS:
            setattr(os, name, watched(getattr(os, name)))

    def count(self, moments):
        if threading.current_thread().name == f"checkpoint-{self.at}" and next(moments) == self.operation:
            self.strike()


class Resources(Callback):
    """What the process holds, every so many steps."""

    def __init__(self, every):
        self.every, self.seen = every, []

    def on_step_end(self, trainer):
        if self.every and trainer.step % self.every == 0:
            gc.collect()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.seen.append({"step": trainer.step, "rss": pages * os.sysconf("SC_PAGE_SIZE"), **held()})


def held():
    return {"descriptors": len(os.listdir("/proc/self/fd")), "threads": len(os.listdir("/proc/self/task"))}  # noqa: PTH208


def left(before):
    """What is held at the end; the system lists a thread that has been joined for a moment longer."""
    for _ in range(100):
        after = held()
        if after["threads"] <= before["threads"]:
            break
        time.sleep(0.01)
    return after


def run(job):
    rank = int(os.environ.get("RANK", "0"))
    strike = Strike(**job["strike"] or {}) if rank == job["struck"] else Strike()
    resources = Resources(job["measure_every"])
    handlers = [signal.getsignal(number) for number in HANDLED_SIGNALS]
    answer = {"raised": None, "before": held()}
    try:
        trainer = Trainer(
            GPTConfig(block_size=16, vocab_size=257, n_layer=1, n_head=2, n_embd=16, dropout=0.1),
            Samples(lambda: strike.moment("data"), **job["data"]),
            Samples(lambda: strike.moment("evaluation")),
            config=TrainerConfig(**SETTINGS | job["config"]),
            callbacks=[strike, resources],
        )
        trainer.train(resume=True)
    except BaseException as error:
        answer["raised"] = type(error).__name__
        raise
    finally:
        answer["handlers"] = [signal.getsignal(number) for number in HANDLED_SIGNALS] == handlers
        answer["seconds"] = strike.sent and time.monotonic() - strike.sent
        answer["after"], answer["seen"] = left(answer["before"]), resources.seen
        if rank == 0:
            Path(job["answer"]).write_text(json.dumps(answer))


if __name__ == "__main__":
    serve(run)
