"""How to train a run for longer."""

import shlex
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from homebrew.errors import CheckpointError

if TYPE_CHECKING:
    from homebrew.training.trainer_config import TrainerConfig


def recorded_max_steps(output_dir: str | Path) -> int:
    """Return the `max_steps` of the run in a folder, or 0 if it is not known."""
    from homebrew.hub.model_folder import find_file, read_json

    path = find_file(Path(output_dir), "run.json")
    config = None if path is None else read_json(path).get("config")
    max_steps = config.get("max_steps") if isinstance(config, dict) else None
    return max_steps if isinstance(max_steps, int) else 0


def extension_advice(config: "TrainerConfig", max_steps: int) -> str:
    """Return how to extend the run in `config.output_dir`, with "wsd" from a checkpoint before the decay.

    Args:
        config: Options of the run. `config.max_steps` is the number of steps to extend the run to, if it is above
            `max_steps`. Otherwise the advice is to double the number of steps.
        max_steps: Number of steps in the run.
    """
    from homebrew.checkpoint.compatibility import has_past
    from homebrew.checkpoint.manifest import open_checkpoint
    from homebrew.checkpoint.store import CheckpointStore
    from homebrew.training.schedule import WarmupStableDecay

    longer = config.max_steps if config.max_steps > max_steps else 2 * max_steps
    old, new = (shlex.quote(f"{config.output_dir}{suffix}") for suffix in ("", "-longer"))
    changed = f"homebrew train --resume --output-dir {old} --max-steps {longer} --accept-changes schedule"
    schedule = replace(config, max_steps=max_steps).schedule()
    if not isinstance(schedule, WarmupStableDecay):
        return f"To train longer, with a learning rate that rises again: {changed}"
    decay_start = schedule.decay_start
    store = CheckpointStore(Path(config.output_dir))
    schedule = replace(config, max_steps=longer).schedule()
    kept = []
    for step in store.steps():
        with suppress(CheckpointError):  # invalid checkpoints are skipped
            if step <= decay_start and has_past(open_checkpoint(store.path(step)).identity, schedule, step):
                kept.append(step)
    if not kept:
        return (
            f"No checkpoint from before the decay of the learning rate, which began at step {decay_start}, is kept "
            f"(see --keep-every). To train longer all the same, with a learning rate that rises again: {changed}"
        )
    return (
        f"To train longer, continue from step {kept[-1]}, before the decay of the learning rate, in a new folder: "
        f"mkdir -p {new}/checkpoints && cp {old}/run.json {new} && "
        f"cp -r {old}/checkpoints/{store.path(kept[-1]).name} {new}/checkpoints && "
        f"homebrew train --resume --output-dir {new} --max-steps {longer}"
    )
