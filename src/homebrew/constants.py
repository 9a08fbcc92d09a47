"""Facts that several packages share."""

from typing import Literal

IGNORE_INDEX = -100
"""A target that is not scored, as in `torch.nn.functional.cross_entropy`."""

Aspect = Literal["model", "adapter", "dataset", "optimizer", "schedule", "global_batch_size", "seed"]
"""A property of a run that a checkpoint records; `accept_changes` names those that may differ on resume."""
