"""Training runs that receive signals at chosen moments.

A job names the run's settings, the signals, and the rank that receives them. Rank 0 writes the results to a file.
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
    """A dataset that calls `on_read` for each sample, and may be slow or mask targets at random."""

    def __init__(self, on_read, slow=0.0, noisy=False):
        self.on_read, self.slow, self.noisy = on_read, slow, noisy
        self.dataset = TokenDataset.from_text(TEXT, block_size=16, tokenizer="bytes")
        self.fingerprint = self.dataset.fingerprint

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        self.on_read()
        time.sleep(self.slow)
        input_ids, targets = self.dataset[i]
        return input_ids, torch.where(torch.rand(16) < 0.2, -100, targets) if self.noisy else targets


class SendSignals(Callback):
    """Sends signals to this process, once.

    Args:
        signals: Names of the signals.
        where: "step", "backward", "data", "evaluation" or "save".
        step: Step at which to send them.
        delay: Seconds to wait, with "step".
        operation: Index of the file-system operation of the save, with "save".
        note: File that records whether a checkpoint was being written.
        workers: Whether loader workers receive the signals too, as from Ctrl-C and from many schedulers.
    """

    def __init__(self, signals=(), where=None, step=0, delay=0.0, operation=0, note=None, workers=False):
        self.signals, self.where, self.at, self.delay, self.operation = signals, where, step, delay, operation
        self.note, self.workers = note, workers
        self.step = self.sent = None
        if where == "save":
            self.watch_writer()

    def send(self):
        if self.sent is None:
            self.sent = time.monotonic()
            if self.note is not None:
                saving = any(thread.name.startswith("checkpoint-") for thread in threading.enumerate())
                Path(self.note).write_text(json.dumps({"saving": saving}))
            workers = [worker.pid for worker in multiprocessing.active_children()] if self.workers else []
            for name in self.signals:
                for process in (*workers, os.getpid()):
                    os.kill(process, getattr(signal, name))

    def reach(self, where):
        """Send the signals if this is the chosen place and step."""
        if where == self.where and self.step == self.at:
            self.send()

    def on_train_begin(self, trainer):
        self.step = trainer.step
        trainer.model.transformer.ln_f.bias.register_hook(lambda _: self.reach("backward"))

    def on_step_end(self, trainer):
        self.step = trainer.step
        if self.where == "step" and self.step == self.at:
            threading.Timer(self.delay, self.send).start()
        if self.where == "save" and self.step > self.at + 2:
            self.send()  # the save had fewer operations

    def watch_writer(self):
        """Count the writer's file-system operations, before and after each."""
        counter = itertools.count()

        def watched(function):
            def call(*args, **kwargs):
                self.count(counter)
                result = function(*args, **kwargs)
                self.count(counter)
                return result

            return call

        for name in OPERATIONS:
            setattr(os, name, watched(getattr(os, name)))

    def count(self, counter):
        if threading.current_thread().name == f"checkpoint-{self.at}" and next(counter) == self.operation:
            self.send()


class Resources(Callback):
    """Records the memory, descriptors and threads of the process every few steps."""

    def __init__(self, every):
        self.every, self.records = every, []

    def on_step_end(self, trainer):
        if self.every and trainer.step % self.every == 0:
            for thread in threading.enumerate():
                if thread.name.startswith("checkpoint-"):  # has open files
                    thread.join()
            gc.collect()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            rss = pages * os.sysconf("SC_PAGE_SIZE")
            self.records.append({"step": trainer.step, "rss": rss, **open_resources()})


def open_resources():
    return {"descriptors": len(os.listdir("/proc/self/fd")), "threads": len(os.listdir("/proc/self/task"))}  # noqa: PTH208


def remaining_resources(before):
    """Return what is open at the end. The kernel lists a joined thread for a moment longer."""
    for _ in range(100):
        after = open_resources()
        if after["threads"] <= before["threads"]:
            break
        time.sleep(0.01)
    return after


def run(job):
    rank = int(os.environ.get("RANK", "0"))
    signals = SendSignals(**job["signals"] or {}) if rank == job["rank"] else SendSignals()
    resources = Resources(job["measure_every"])
    handlers = [signal.getsignal(number) for number in HANDLED_SIGNALS]
    result = {"raised": None, "before": open_resources()}
    try:
        trainer = Trainer(
            GPTConfig(block_size=16, vocab_size=257, n_layer=1, n_head=2, n_embd=16, dropout=0.1),
            Samples(lambda: signals.reach("data"), **job["data"]),
            Samples(lambda: signals.reach("evaluation")),
            config=TrainerConfig(**SETTINGS | job["config"]),
            callbacks=[signals, resources],
        )
        trainer.train(resume=True)
    except BaseException as error:
        result["raised"] = type(error).__name__
        raise
    finally:
        result["handlers_restored"] = [signal.getsignal(number) for number in HANDLED_SIGNALS] == handlers
        result["seconds"] = signals.sent and time.monotonic() - signals.sent
        result["after"], result["resources"] = remaining_resources(result["before"]), resources.records
        if rank == 0:
            Path(job["result"]).write_text(json.dumps(result))


if __name__ == "__main__":
    serve(run)
