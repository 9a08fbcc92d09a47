"""Facts that several packages share."""

from typing import Literal

IGNORE_INDEX = -100
"""A target that is not scored, as in `torch.nn.functional.cross_entropy`."""

Aspect = Literal["model", "adapter", "dataset", "optimizer", "schedule", "global_batch_size", "seed"]
"""A property of a run that a checkpoint records; `accept_changes` names those that may differ on resume."""

RUN_FILES = ("metrics.jsonl", "samples.jsonl", "curves.png", "run.json", "logs", "checkpoints")
"""What a run writes to its folder, `checkpoints` last: without them, a folder does not count as holding a run."""

TOKENIZER_FILE = "tokenizer.json"
"""Name of the file of a tokenizer, in a folder of texts, a run or an export."""
