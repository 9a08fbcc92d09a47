"""Saves a run and brings it back: what the run is, what it holds, and the checkpoints on the disk, together."""

import json
import socket
import time
import warnings
from collections.abc import Collection
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from homebrew.checkpoint.async_writer import AsyncWriter
from homebrew.checkpoint.checkpoint_files import write_files
from homebrew.checkpoint.compatibility import check_identity
from homebrew.checkpoint.manifest import STATE, Checkpoint
from homebrew.checkpoint.optimizer_numbers import OptimizerNumbers
from homebrew.checkpoint.reports import SHARE, Reports
from homebrew.checkpoint.state_dict import (
    Files,
    Stateful,
    check_files,
    gather_run,
    reserve_staging,
    run_bytes,
    scatter_run,
)
from homebrew.checkpoint.store import CheckpointStore
from homebrew.data.tokenizer import Tokenizer
from homebrew.distributed.collectives import gather_bytes, is_lost, run_on_main
from homebrew.distributed.fsdp import uses_fsdp
from homebrew.errors import CheckpointError, ConfigError, CorruptCheckpoint
from homebrew.model.gpt import GPT

_ERROR_DELAY_SECONDS = 3.0
_ASK_SECONDS = 1.0
"""How long a process waits for its own writer before it asks for the others'."""


class CheckpointManager:
    """The checkpoints of one run; every method is collective.

    While it is entered the run trains; at the end it waits for the writer, whatever becomes of it.

    Args:
        accelerator: of the run.
        bare: the model without wrappers.
        model: as `prepare` returned it.
        optimizer: not as `prepare` returned it.
        guard: of the run's updates.
        output_dir: The run's folder.
        keep_last: Newest checkpoints to keep.
        keep_every: Keep checkpoints at multiples of this step for good.
        gather_limit_bytes: Under FSDP, the largest checkpoint that rank 0 gathers and writes alone.
        timeout_seconds: How long rank 0 waits for the other ranks' files.
        seed: The run's random seed.
        identity: what decides the run's every step (`compatibility.run_identity`).
        tokenizer: of the run's text, for whoever opens a checkpoint without the dataset.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        bare: GPT,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        guard: Stateful,
        *,
        output_dir: Path,
        keep_last: int,
        keep_every: int | None,
        gather_limit_bytes: int,
        timeout_seconds: float,
        seed: int,
        identity: dict[str, Any],
        tokenizer: Tokenizer | None,
    ) -> None:
        self._accelerator = accelerator
        self._bare = bare
        self._model = model
        self._optimizer = optimizer
        self._numbers = OptimizerNumbers(bare, optimizer)
        self._told_of_lost = False
        self._guard = guard
        self._output_dir = output_dir
        self._seed = seed
        self._identity = identity
        self._tokenizer = None if tokenizer is None else tokenizer.to_json()
        self._store = CheckpointStore(output_dir, keep_last=keep_last, keep_every=keep_every)
        self._writer = AsyncWriter()
        self._reports: Reports | None = None
        """What the others write, where all write together."""
        several = uses_fsdp(accelerator) and accelerator.num_processes > 1
        if several and run_bytes(bare) > gather_limit_bytes:
            self._reports = Reports(accelerator, timeout_seconds)
        self._saved_step: int | None = None
        self._began = False
        self._found: Files = {}

    def restore(self, resume: bool | str | Path, accept_changes: Collection[str]) -> int:
        """Bring the run to where it starts: weights, optimizer, random states.

        Args:
            resume: True for the newest whole checkpoint, if there is one; a path for that one.
            accept_changes: aspects in which the checkpoint's run may differ.

        Returns:
            Optimizer steps already taken.

        Raises:
            ConfigError: the folder cannot be written, or holds a run and `resume` is False or an older checkpoint's.
            CheckpointError: a checkpoint is damaged, or belongs to another run.
        """
        accelerator, seed = self._accelerator, self._seed
        start = run_on_main(accelerator, lambda: self._find(resume, accept_changes))
        set_seed(seed, device_specific=True)
        if self._began and not start["found"] and accelerator.is_main_process:
            warnings.warn(
                "This Trainer has trained before, and there is no checkpoint to go back to: it starts at step 0 with "
                "the weights and the optimizer it has. For a fresh start build a new model and Trainer.",
                stacklevel=4,
            )
        self._began = True
        step: int = start["step"]
        self._saved_step = step if start["ours"] else None
        if start["found"]:
            files, self._found = self._found, {}
            scatter_run(accelerator, self._model, self._optimizer, self._guard, files, seed=seed + step)
            self._numbers.restore(start["optimizer"])
        if self._reports is not None:
            self._check_shared(step)
        reserve_staging(accelerator, self._model, in_pieces=self._reports is not None)
        return step

    def _find(self, resume: bool | str | Path, accept_changes: Collection[str]) -> dict[str, Any]:
        """On the first process: the checkpoint to go on from, read and checked."""
        self._store.prepare()
        if not resume and self._store.steps():
            raise ConfigError(
                f"output_dir={str(self._output_dir)!r} already holds a run. Go on with it by "
                f"train(resume=True), which is --resume on the command line, or choose another folder."
            )
        checkpoint = None
        if resume is True:
            checkpoint, passed_over = self._store.latest()
            if checkpoint is None and passed_over:
                raise CorruptCheckpoint(
                    f"No checkpoint in {self._store.folder} is whole: {'; '.join(passed_over)} To start anew, move "
                    f"them away or choose another output_dir."
                )
            for reason in passed_over:
                warnings.warn(f"Passed over a checkpoint: {reason}", stacklevel=6)
        elif resume:
            if Path(resume, "checkpoints").is_dir():
                raise ConfigError(f"{resume} is a run's folder: give resume=True, or one of its checkpoints.")
            checkpoint = self._store.open(resume)
            self._check_newest(checkpoint)
        if checkpoint is None:
            if resume and not self._began and Path(self._output_dir, "metrics.jsonl").exists():
                warnings.warn(
                    f"{self._output_dir} has figures of a run that saved no checkpoint: it begins anew. With a "
                    f"smaller save_every less is lost.",
                    stacklevel=6,
                )
            return {"found": False, "ours": False, "step": 0}
        check_identity(checkpoint.state.get("identity"), self._identity, accept_changes)
        self._warn_of_differences(checkpoint)
        self._found = checkpoint.files()
        check_files(checkpoint.path, self._found, self._bare, self._optimizer)
        self._numbers.check(checkpoint.state.get("optimizer"), checkpoint.path / STATE)
        ours = checkpoint.path.resolve() == self._store.path(checkpoint.step).resolve()
        numbers = checkpoint.state.get("optimizer")
        return {"found": True, "ours": ours, "step": checkpoint.step, "optimizer": numbers}

    def _check_newest(self, checkpoint: Checkpoint) -> None:
        """Refuse a checkpoint where the run has a newer one: the next resume would go on from that.

        Raises:
            ConfigError: it has.
        """
        if max(self._store.steps(), default=0) <= checkpoint.step:
            return
        newest, _ = self._store.latest()
        if newest is not None and newest.step > checkpoint.step:
            raise ConfigError(
                f"resume={str(checkpoint.path)!r} is older than {newest.path}, which a later train(resume=True) would "
                f"go on from. Choose another output_dir, move the newer ones away, or go on with train(resume=True)."
            )

    def _warn_of_differences(self, checkpoint: Checkpoint) -> None:
        """Say what does not keep a run from going on, but from going on bitwise."""
        saved, ours = checkpoint.state.get("mixed_precision"), self._accelerator.mixed_precision
        if saved != ours:
            warnings.warn(
                f"{checkpoint.path} was trained with mixed_precision={saved!r}, this run has {ours!r}: was it launched "
                f"in another way? It goes on, but not as the run it was.",
                stacklevel=7,
            )
        saved, ours = checkpoint.state.get("num_processes"), self._accelerator.num_processes
        if saved != ours:
            warnings.warn(
                f"{checkpoint.path} was saved by {saved} process(es), this run has {ours}: it goes on with the same "
                f"samples, but sums are taken in another order, so bitwise equality is not promised.",
                stacklevel=7,
            )

    def path(self, step: int) -> Path:
        """The folder of a step's checkpoint, whether it is there or not."""
        return self._store.path(step)

    def save(self, step: int, *, eval_loss: float | None = None) -> None:
        """Hand a checkpoint of this step to the writer.

        Raises:
            CheckpointError: an earlier checkpoint could not be written.
        """
        reports, store = self._reports, self._store
        others = None
        self.wait()
        files = gather_run(self._accelerator, self._model, self._optimizer, self._guard, in_pieces=reports is not None)
        if reports is not None:
            token = run_on_main(self._accelerator, partial(self._start, step))
            others = partial(reports.collect, token, store.temporary(step))
        if self._accelerator.is_main_process:
            write = partial(store.save, step, files, self._state(), score=eval_loss, others=others)
            self._writer.start(write, name=f"checkpoint-{step}")
        elif reports is not None:
            part = partial(write_files, store.temporary(step), step, files)
            self._writer.start(partial(reports.send, token, part), name=f"checkpoint-{step}")
        self._saved_step = step

    def _start(self, step: int) -> str:
        """On the first process: make the folder that all write into."""
        self._store.start(step)
        return Reports.new_token()

    def _check_shared(self, step: int) -> None:
        """Learn before the run, and not at its first save, whether all processes see the same folder.

        Raises:
            ConfigError: they do not.
        """
        run_on_main(self._accelerator, partial(self._start, step))
        seen = [self._store.temporary(step).is_dir(), socket.gethostname()]
        found = [json.loads(answer) for answer in gather_bytes(self._accelerator, json.dumps(seen).encode())]
        run_on_main(self._accelerator, partial(self._store.cancel, step))
        if blind := [f"{rank} on {host}" for rank, (sees, host) in enumerate(found) if not sees]:
            raise ConfigError(
                f"output_dir={str(self._output_dir)!r} as the first process sees it is not there for process "
                f"{', '.join(blind)}. {SHARE}"
            )

    def is_saved(self, step: int) -> bool:
        """Whether this step has been handed to the writer."""
        return self._saved_step == step

    def _state(self) -> dict[str, Any]:
        """What a checkpoint holds besides tensors: only what is no function of the step."""
        numbers, lost = self._numbers.state()
        if lost and not self._told_of_lost:
            warnings.warn(
                f"{type(self._optimizer).__name__} keeps {', '.join(lost)}, which no checkpoint holds: a resumed run "
                f"may differ from an unbroken one.",
                stacklevel=6,
            )
            self._told_of_lost = True
        return {
            "optimizer": numbers,
            "identity": self._identity,
            "tokenizer": self._tokenizer,
            "base": self._bare.source,
            "num_processes": self._accelerator.num_processes,
            "mixed_precision": self._accelerator.mixed_precision,
        }

    @property
    def failed(self) -> bool:
        """Whether this process's writer has failed."""
        return self._writer.failed

    def wait(self) -> None:
        """Wait until no process writes any more.

        They ask each other again and again: no collective waits for a disk, and a process that is lost is soon a
        collective's error, on the first process too, whose writer may wait for that one's part.

        Raises:
            CheckpointError: on every process, if not what its own writer has failed with: one could not write.
        """
        writing = failed = True
        while writing:
            mine = [self._writer.is_writing(_ASK_SECONDS), self._writer.failed]
            told = gather_bytes(self._accelerator, json.dumps(mine).encode())
            writing, failed = map(any, zip(*map(json.loads, told), strict=True))
        if failed:
            self._raise_failure()

    def finish(self) -> None:
        """`wait`, outside a run: here too a process that is lost ends the first one's wait for its part."""
        with self:
            self.wait()

    def _raise_failure(self) -> None:
        """Raise what a writer has failed with, once all know that one has: its own error, or what it says."""
        self._saved_step = None
        own = self._writer.take_error()
        told = gather_bytes(self._accelerator, json.dumps(own and str(own)).encode())
        failed = {rank: text for rank, text in enumerate(map(json.loads, told)) if text is not None}
        rank = max(failed)  # the first process's error may be about another's
        if rank != self._accelerator.process_index:
            time.sleep(_ERROR_DELAY_SECONDS)  # the failing rank's own error should be shown first
        raise own or CheckpointError(f"Process {rank} could not write a checkpoint: {failed[rank]}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._reports is not None and error is not None and (is_lost(error) or is_lost(error.__cause__)):
            self._reports.give_up()
        self._writer.close()
        if error is not None:
            self._saved_step = None  # who asks for this step's save again does not know whether it was written
            if own := self._writer.take_error():
                warnings.warn(f"A checkpoint could not be written either: {own}", stacklevel=3)
