"""Load and check the state of a checkpoint. State that accepted changes have made invalid is dropped."""

import warnings
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from homebrew.checkpoint.checkpoint_files import TensorFiles
from homebrew.checkpoint.manifest import STATE, Checkpoint
from homebrew.checkpoint.state_dict import Stateful, check_files
from homebrew.constants import Aspect
from homebrew.errors import CorruptCheckpoint


def load_state(
    checkpoint: Checkpoint,
    changed: Collection[Aspect],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    guard: Stateful,
) -> tuple[TensorFiles, dict[str, Any]]:
    """Load a checkpoint's tensors and numbers, without changing the run, and warn about state that is not used.

    With another dataset or seed, the data is read from the start of the first epoch. With another dataset, the guard
    forgets past losses; with another seed, the random states are new. Another optimizer starts without state.

    Args:
        checkpoint: Checkpoint to resume from.
        changed: Result of `compatibility.check_identity`.
        model: Model without wrappers.
        optimizer: Optimizer without Accelerate's wrapper.
        guard: The run's update guard in its initial state.

    Returns:
        The tensors for `scatter_run`, and `step`, `num_samples` and `optimizer` (its state) as JSON values.

    Raises:
        CorruptCheckpoint: A tensor or a number is missing or malformed.
        ResumeMismatch: The optimizer does not hold a parameter whose state was saved.
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
        files["guard"] = guard.state_dict()
        dropped.append("loss statistics")
    if "optimizer" in changed:
        files["optimizer"] = {}
        optimizer_state = {"tensors": {}, "parameters": {}, "groups": [{} for _ in optimizer.param_groups]}
        dropped.append("optimizer state")
    check_files(path, files, optimizer_state, model, optimizer)
    if "seed" in changed:
        files = {name: tensors for name, tensors in files.items() if not name.startswith("rng-")}
        dropped.append("random states")
    if dropped:
        warnings.warn(
            f"{path} is resumed without its {', '.join(dropped)}, because of the accepted changes: "
            f"{', '.join(sorted(changed))}.",
            stacklevel=7,
        )
    return files, {"step": checkpoint.step, "num_samples": num_samples, "optimizer": optimizer_state}
