"""Saves and restores a run. This is the part of the package that the Trainer uses."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from accelerate.utils import set_seed

from homebrew.checkpoint.async_writer import AsyncWriter
from homebrew.checkpoint.checkpoint_files import TensorFiles
from homebrew.checkpoint.compatibility import Identity, check_accept_changes, check_ranks
from homebrew.checkpoint.optimizer_state import check_state, optimizer_json
from homebrew.checkpoint.restore import load_run
from homebrew.checkpoint.run_folder import RunLock, move_run_aside
from homebrew.checkpoint.sharded_save import check_shared_folder, save_sharded
from homebrew.checkpoint.state_dict import RunState, checkpoint_bytes
from homebrew.checkpoint.store import CheckpointStore
from homebrew.checkpoint.tensor_check import check_finite
from homebrew.data.tokenizer import Tokenizer
from homebrew.distributed.collectives import run_on_main
from homebrew.distributed.fsdp import uses_fsdp
from homebrew.errors import CheckpointError, ConfigError, HomebrewError
from homebrew.model.interfaces import interface_of
from homebrew.optim.combined import class_names
from homebrew.user_warnings import warn

_POLL_SECONDS = 1.0


class CheckpointManager:
    """Saves and restores one run. Every rank must call `restore`, `save`, `wait` and `finish`.

    A checkpoint is gathered on rank 0 and written there in a background thread. Under FSDP, a checkpoint larger than
    `gather_limit_bytes` is written by all ranks together, each its own shards. Such a save is synchronous, because its
    collectives would interleave with training's if they ran in a thread.

    As a context manager, it waits at the end of the block until the background thread has finished.

    Args:
        run: State of the run.
        store: The run's checkpoints on disk.
        gather_limit_bytes: Size of the largest checkpoint that rank 0 writes alone under FSDP.
        seed: The run's random seed.
        identity: Result of `compatibility.run_identity`.
        max_steps: Number of steps in the run.
        tokenizer: Saved so that a checkpoint can be used without the dataset.
    """

    def __init__(
        self,
        run: RunState,
        store: CheckpointStore,
        *,
        gather_limit_bytes: int,
        seed: int,
        identity: Identity,
        max_steps: int,
        tokenizer: Tokenizer | None,
    ) -> None:
        self._accelerator = run.accelerator
        self._run = run
        self._store = store
        self._seed = seed
        self._identity = identity
        self._max_steps = max_steps
        self._tokenizer = None if tokenizer is None else tokenizer.to_json()
        self._lock = RunLock(store.folder.parent)
        self._is_locked = False  # the same on all ranks, although only rank 0 holds the lock
        self._writer = AsyncWriter()
        multi_rank_fsdp = uses_fsdp(run.accelerator) and run.accelerator.num_processes > 1
        self._sharded = multi_rank_fsdp and checkpoint_bytes(run.model, run.optimizer) > gather_limit_bytes
        self._saved_step: int | None = None
        self._restored = False  # whether `restore` has been called
        self._warned = False

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Let only this run write to its folder during the block; collective. Blocks may be nested.

        Raises:
            ConfigError: On every rank, if another run uses the folder, or it cannot be written to.
        """
        if self._is_locked:
            yield
            return
        try:
            self._writer.close()  # a write may be running if an earlier wait was interrupted
            run_on_main(self._accelerator, self._lock.acquire)
            self._is_locked = True
            yield
        finally:
            self._is_locked = False
            self._run.built.end_run()
            self._writer.close()  # if this is interrupted too, the lock stays until the next block
            self._lock.release()

    def restore(
        self, resume: bool | str | Path, accept_changes: Collection[str] = (), *, overwrite: bool = False
    ) -> tuple[int, int]:
        """Restore weights, optimizer and random states from a checkpoint, or seed the random states at step 0.

        Args:
            resume: True for the newest valid checkpoint, if there is one; or the path of a checkpoint.
            accept_changes: Aspects in which the checkpoint's run may differ from this one.
            overwrite: Whether to move an earlier run aside, instead of raising an error.

        Returns:
            Number of optimizer steps already taken, and the position in the data as a number of samples.

        Raises:
            ConfigError: The folder cannot be written to; it holds a run, and neither `resume` nor `overwrite` is
                given; it holds a newer checkpoint than the one named; the checkpoint's step is above `max_steps`; or
                `accept_changes` is given without `resume`.
            LaunchError: The ranks have different settings.
            CheckpointError: A checkpoint is corrupt, or belongs to another run.
        """
        check_accept_changes(accept_changes)
        if accept_changes and not resume:
            raise ConfigError(f"accept_changes={accept_changes!r} applies to resuming a run. Pass resume=True as well.")
        accelerator = self._accelerator
        check_ranks(accelerator, self._identity(self._max_steps))
        files = TensorFiles()  # stays empty on other ranks
        if overwrite:
            run_on_main(accelerator, partial(move_run_aside, self._store.folder.parent))
        load = partial(
            load_run,
            files,
            self._store,
            resume,
            accept_changes,
            run=self._run,
            identity=self._identity,
            max_steps=self._max_steps,
            has_trained=self._restored,
        )
        start = run_on_main(accelerator, load)
        set_seed(self._seed, device_specific=True)
        if self._restored:
            self._run.built.reset(accelerator)
        self._restored = True
        step: int = start["step"]
        self._saved_step = step if start["in_store"] else None
        if start["optimizer"] is not None:
            self._run.scatter(files, start["optimizer"], seed=self._seed + step)
        if self._sharded:
            check_shared_folder(accelerator, self._store, step)
        else:
            self._run.reserve_staging()
        return step, start["num_samples"]

    def path(self, step: int) -> Path:
        """Return the folder of a step's checkpoint, whether or not it exists."""
        return self._store.path(step)

    def is_saved(self, step: int) -> bool:
        """Return whether `save` has been called for this step and has not failed since."""
        return self._saved_step == step

    def save(self, step: int, num_samples: int, *, eval_loss: float | None = None) -> None:
        """Save a checkpoint, in the background unless it is sharded.

        Args:
            step: Optimizer steps taken.
            num_samples: Position in the data. It does not follow from the step if the batch size was changed on resume.
            eval_loss: Evaluation loss at this step; the checkpoint with the lowest is kept.

        Raises:
            ConfigError: The optimizer has state that a checkpoint cannot hold.
            CheckpointError: An earlier checkpoint, or this sharded one, could not be written.
            NonFiniteError: A trained weight is not finite, or an optimizer state is NaN.
        """
        self.wait()
        check_state(self._run.optimizer)
        accelerator, store = self._accelerator, self._store
        state = self._state(step, num_samples) if accelerator.is_main_process else {}
        constants = self._run.constants()
        if self._sharded:
            files = self._run.gather_small()
            shards = self._run.sharded_tensors()
            save_sharded(accelerator, store, step, shards, files, state, score=eval_loss, constants=constants)
        else:
            files = self._run.gather()
            if accelerator.is_main_process:

                def write() -> None:
                    check_finite(step, files, constants)
                    store.save(step, files, state, score=eval_loss)

                self._writer.start(write, name=f"checkpoint-{step}")
        self._saved_step = step

    def _state(self, step: int, num_samples: int) -> dict[str, Any]:
        """Return the contents of `state.json`: all state other than tensors that does not follow from the step."""
        numbers, unsupported = optimizer_json(self._run.model, self._run.optimizer, self._run.built.settings)
        if unsupported and not self._warned:
            self._warned = True
            warn(
                f"Checkpoints do not contain {', '.join(unsupported)} of {class_names(self._run.optimizer)}: a resumed "
                f"run may differ from an uninterrupted one. Keep such state as tensors or plain numbers per parameter, "
                f"or as plain numbers in parameter groups."
            )
        return {
            "num_samples": num_samples,
            "optimizer": numbers,
            "identity": self._identity(step),
            "tokenizer": self._tokenizer,
            "base": interface_of(self._run.model).source,
            "num_processes": self._accelerator.num_processes,
            "mixed_precision": self._accelerator.mixed_precision,
        }

    @property
    def failed(self) -> bool:
        """Whether a background write of this rank has failed and its error has not been raised yet."""
        return self._writer.failed

    def wait(self) -> None:
        """Wait until rank 0 has finished writing.

        The other ranks poll, so that no collective has to wait for a slow disk.

        Raises:
            CheckpointError: On every rank, if the checkpoint could not be written.
            NonFiniteError: On every rank, if a weight or an optimizer state was not finite.
        """
        try:
            while run_on_main(self._accelerator, self._poll_writer):
                pass
        except HomebrewError:
            self._saved_step = None
            raise

    def _poll_writer(self) -> bool:
        """On rank 0, return whether the writer is still running, and raise its error if it has failed.

        Only a HomebrewError reaches the other ranks, so every other error becomes a CheckpointError.
        """
        if self._writer.is_writing(_POLL_SECONDS):
            return True
        try:
            self._writer.wait()
        except HomebrewError:
            raise
        except Exception as error:
            raise CheckpointError(f"The checkpoint could not be written: {error!r}.") from error
        return False

    def finish(self) -> None:
        """Wait for the writer outside of training, even if a collective operation fails."""
        with self:
            self.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self._saved_step = None  # it is not known whether this step was written
        self._writer.close()
        if error is not None and (write_error := self._writer.take_error()):
            warn(f"A checkpoint could not be written either: {write_error}")
