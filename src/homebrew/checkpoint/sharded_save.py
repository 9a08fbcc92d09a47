"""Saves a checkpoint from all ranks together, through torch.distributed.checkpoint.

Every rank writes its own shards into the temporary folder, on a file system that all ranks share; rank 0 commits it.
"""

import contextlib
import socket
from collections.abc import Collection, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from homebrew.checkpoint.checkpoint_files import TensorFiles
from homebrew.checkpoint.store import CheckpointStore
from homebrew.checkpoint.tensor_check import check_finite
from homebrew.checkpoint.verified_files import Entry, measure
from homebrew.distributed.collectives import run_on_all, run_on_main
from homebrew.errors import CheckpointError, ConfigError, HomebrewError


def save_sharded(
    accelerator: Accelerator,
    store: CheckpointStore,
    step: int,
    shards: TensorFiles,
    files: TensorFiles,
    state: Mapping[str, Any],
    *,
    score: float | None,
    constants: Collection[str] = (),
) -> None:
    """Write a checkpoint on all ranks, and commit it on rank 0; collective.

    Args:
        accelerator: The run's accelerator.
        store: The run's store.
        step: Optimizer steps taken.
        shards: DTensors, or tensors that are equal on all ranks, by the folder that their shards are written to.
        files: Small CPU tensors; used on rank 0 only.
        state: JSON object; used on rank 0 only.
        score: Evaluation loss, or None.
        constants: Names of tensors that need not be finite.

    Raises:
        CheckpointError: On every rank, if any rank could not write; earlier checkpoints are unchanged.
        NonFiniteError: On every rank, if a tensor on any rank has values that are not finite.
    """
    folder = store.temporary_path(step)
    run_on_all(accelerator, partial(check_finite, step, shards | files, constants))
    run_on_main(accelerator, partial(store.begin, step))
    try:
        for name, tensors in shards.items():
            save_shards(folder / name, tensors)
        measured = run_on_all(accelerator, lambda: _measure(folder, shards, accelerator.process_index))
        entries = {name: Entry(**entry) for entries in measured for name, entry in entries.items()}
        run_on_main(accelerator, lambda: str(store.commit(step, files, state, score=score, shards=entries)))
    except HomebrewError:  # on every rank, and no rank is writing any more
        if accelerator.is_main_process:
            with contextlib.suppress(OSError):  # the first error is the one to raise
                store.roll_back()
        raise


def save_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write the shards that this rank holds, and sync them to disk; collective.

    A shard that several ranks hold is written once. If any rank could not write, all raise CheckpointError.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    try:
        save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items(), key=lambda failure: failure[0])
        raise CheckpointError(f"{folder} could not be written by rank {rank}: {cause}.") from error


def check_shared_folder(accelerator: Accelerator, store: CheckpointStore, step: int) -> None:
    """Check before training that all ranks see a folder that rank 0 creates, or raise ConfigError; collective."""
    run_on_main(accelerator, partial(store.begin, step))
    seen = run_on_all(accelerator, lambda: [store.temporary_path(step).is_dir(), socket.gethostname()])
    run_on_main(accelerator, store.roll_back)
    if missing := [f"{rank} on {host}" for rank, (is_visible, host) in enumerate(seen) if not is_visible]:
        raise ConfigError(
            f"output_dir={str(store.folder.parent)!r} is not the same folder on rank 0 and on rank "
            f"{', '.join(missing)}. Ranks that write a checkpoint together need an output_dir on a shared file "
            f"system; or raise gather_limit_bytes, so that rank 0 writes alone."
        )


def _measure(folder: Path, names: Collection[str], rank: int) -> dict[str, dict[str, Any]]:
    """Return manifest entries of the files that a rank has written: at most one in each folder of shards."""
    paths = [path for name in names for path in (folder / name).glob(f"shard-{rank + 1:05}-*.safetensors")]
    return {str(path.relative_to(folder)): asdict(measure(path)) for path in paths}
