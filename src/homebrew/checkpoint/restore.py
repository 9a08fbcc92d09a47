"""Finds the checkpoint to resume from, checks that it belongs to the run, and loads its state, on rank 0."""

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from homebrew.checkpoint.checkpoint_files import TensorFiles
from homebrew.checkpoint.compatibility import Identity, check_identity, differing_keys
from homebrew.checkpoint.manifest import MANIFEST, STATE, Checkpoint, open_checkpoint
from homebrew.checkpoint.state_dict import RunState
from homebrew.checkpoint.store import CheckpointStore
from homebrew.constants import Aspect
from homebrew.errors import CheckpointError, ConfigError, CorruptCheckpoint
from homebrew.io import absolute_path
from homebrew.user_warnings import warn


def load_run(
    files: TensorFiles,
    store: CheckpointStore,
    resume: bool | str | Path,
    accept_changes: Collection[str],
    *,
    run: RunState,
    identity: Identity,
    max_steps: int,
    has_trained: bool,
) -> dict[str, Any]:
    """Find and check the checkpoint to resume from, and load its tensors into `files`. The run is not changed.

    Args:
        files: Empty dictionary, which is filled for `RunState.scatter`.
        store: The run's store, which is created if it does not exist.
        resume: True for the newest valid checkpoint, if there is one; the path of a checkpoint; or False for a new run.
        accept_changes: Aspects in which the checkpoint's run may differ from this one.
        run: State of the run, with the guard in its initial state.
        identity: Result of `compatibility.run_identity`.
        max_steps: Number of steps in the run.
        has_trained: Whether the model has been trained before.

    Returns:
        `step`, `num_samples`, `optimizer` (its state, None without a checkpoint) and `in_store` (whether the checkpoint
        is one of the store's) as JSON values.

    Raises:
        ConfigError: The store cannot be written to; it has checkpoints, and `resume` is False or names an older one;
            `resume` is a run's folder; or the checkpoint's step is above `max_steps`.
        CheckpointError: There is no checkpoint at the path.
        CorruptCheckpoint: The checkpoint is invalid, or all checkpoints in the store are.
        ResumeMismatch: The checkpoint belongs to another run.
    """
    store.prepare()
    checkpoint = _find_checkpoint(store, resume)
    if checkpoint is None:
        _warn_if_not_new(store.folder.parent, resume, has_trained=has_trained)
        return {"step": 0, "num_samples": 0, "optimizer": None, "in_store": False}
    if checkpoint.step > max_steps:
        raise ConfigError(
            f"max_steps={max_steps}: the checkpoint is at step {checkpoint.step}. Set max_steps to at least "
            f"{checkpoint.step}, or resume from an earlier checkpoint in another output_dir."
        )
    ours = identity(checkpoint.step)
    changed = check_identity(checkpoint.identity, ours, accept_changes)
    _warn_if_not_bitwise(checkpoint, run.accelerator)
    tensors, start = _load_state(checkpoint, changed, run)
    for key in differing_keys(checkpoint.identity.get("optimizer"), ours["optimizer"]):
        for group in start["optimizer"]["groups"]:
            group.pop(key, None)  # use this run's accepted setting, not one that the saved run changed later
    files.update(tensors)
    in_store = checkpoint.path.resolve() == store.path(checkpoint.step).resolve()
    if in_store:
        store.prune(checkpoint.step)  # the saved run may have been killed before it pruned
    return start | {"in_store": in_store}


def _find_checkpoint(store: CheckpointStore, resume: bool | str | Path) -> Checkpoint | None:
    """Open the checkpoint to resume from, or return None to start at step 0."""
    if not resume:
        store.check_is_empty()
        return None
    if resume is True:
        newest, reasons = store.latest()
        if newest is None and reasons:
            raise CorruptCheckpoint(
                f"No valid checkpoint in {store.folder}: {' '.join(reasons)} To start over, move the checkpoints away "
                f"or choose another output_dir."
            )
        for reason in reasons:
            warn(f"Ignored an invalid checkpoint: {reason}")
        return newest
    path = absolute_path(resume)
    if Path(path, "checkpoints").is_dir():
        raise ConfigError(f"resume={str(path)!r} is a run's folder. Use resume=True, or one of its checkpoints.")
    if not any(os.path.lexists(path / name) for name in (MANIFEST, STATE)):
        raise _no_checkpoint(store, path)
    checkpoint = open_checkpoint(path)
    if max(store.steps(), default=0) > checkpoint.step:
        newest, _ = store.latest()
        if newest is not None and newest.step > checkpoint.step:
            raise ConfigError(
                f"resume={str(checkpoint.path)!r} is older than {newest.path}, from which a later train(resume=True) "
                f"would resume. Choose another output_dir, move the newer checkpoints away, or use train(resume=True)."
            )
    return checkpoint


def _no_checkpoint(store: CheckpointStore, path: Path) -> CheckpointError:
    """Return the error for a path that is not a checkpoint."""
    problem = "is not a checkpoint" if os.path.lexists(path) else "does not exist"
    steps = store.steps()
    newest = f" The newest checkpoint of this run is {store.path(steps[-1])}." if steps else ""
    return CheckpointError(f"resume={str(path)!r} {problem}. Check the path, or use resume=True.{newest}")


def _warn_if_not_new(output_dir: Path, resume: bool | str | Path, *, has_trained: bool) -> None:
    """Warn if there is no checkpoint, but the run is not a new one."""
    if has_trained:
        warn(
            "This Trainer has trained before, and there is no checkpoint to resume from: it starts at step 0 with the "
            "model's current weights and the optimizer as it was built. To start from new weights, build a new model "
            "and Trainer."
        )
    elif resume and (output_dir / "metrics.jsonl").exists():
        warn(f"{output_dir} has metrics but no checkpoint: starting at step 0. A smaller save_every loses fewer steps.")


def _warn_if_not_bitwise(checkpoint: Checkpoint, accelerator: Accelerator) -> None:
    """Warn about differences that prevent a bitwise resume."""
    effects = {
        "mixed_precision": "Results will differ from those of the original run; check how the run was launched.",
        "num_processes": "Samples are the same, but sums are in another order: results may not be bitwise equal.",
    }
    for name, effect in effects.items():
        saved, ours = checkpoint.state.get(name), getattr(accelerator, name)
        if saved != ours:
            warn(f"{checkpoint.path} was saved with {name}={saved!r}, this run has {name}={ours!r}. {effect}")


def _load_state(
    checkpoint: Checkpoint, changed: Collection[Aspect], run: RunState
) -> tuple[TensorFiles, dict[str, Any]]:
    """Load a checkpoint's tensors and numbers, without the state that accepted changes have made invalid.

    With another dataset or seed, the data is read from the start of the first epoch. With another dataset, the guard
    forgets past losses; with another seed, the random states are new. Another optimizer starts without state.
    """
    path, files = checkpoint.path, checkpoint.files()
    num_samples, optimizer_state = (checkpoint.state.get(name) for name in ("num_samples", "optimizer"))
    if type(num_samples) is not int or num_samples < 0:
        raise CorruptCheckpoint(f"{path / STATE} does not hold the number of samples that the run has read.")
    dropped = []
    if "dataset" in changed or "seed" in changed:
        num_samples = 0
        dropped.append("data position")
    if "dataset" in changed:
        files["guard"] = run.guard.state_dict()
        dropped.append("loss statistics")
    if "optimizer" in changed:
        files["optimizer"] = {}
        optimizer_state = {"tensors": {}, "parameters": {}, "groups": [{} for _ in run.optimizer.param_groups]}
        dropped.append("optimizer state")
    run.check(path, files, optimizer_state)
    if "seed" in changed:
        files = {name: tensors for name, tensors in files.items() if not name.startswith("rng-")}
        dropped.append("random states")
    if dropped:
        warn(
            f"{path} is resumed without its {', '.join(dropped)}, because of the accepted changes: "
            f"{', '.join(sorted(changed))}."
        )
    return files, {"step": checkpoint.step, "num_samples": num_samples, "optimizer": optimizer_state}
