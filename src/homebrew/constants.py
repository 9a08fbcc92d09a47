"""Constants that several packages share."""

from typing import Literal

IGNORE_INDEX = -100
"""A target that is not scored, as in `torch.nn.functional.cross_entropy`."""

Aspect = Literal["model", "adapter", "dataset", "optimizer", "schedule", "global_batch_size", "seed"]
"""A property of a run that a checkpoint records; `accept_changes` names those that may differ on resume."""

RUN_FILES = ("metrics.jsonl", "samples.jsonl", "curves.png", "run.json", "logs", "checkpoints")
"""Files and folders that a run writes. `checkpoints` is moved aside last: a folder without it does not hold a run."""

TOKENIZER_FILE = "tokenizer.json"
"""Name of the file of a tokenizer, in a folder of texts, a run or an export."""
