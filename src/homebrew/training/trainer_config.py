"""What a training run is told."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeGuard

from homebrew.errors import ConfigError
from homebrew.training.schedule import Schedule, warmup_cosine

NonFinitePolicy = Literal["raise", "skip"]


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """A run's settings; the defaults are GPT-3's for its smallest model (Brown et al. 2020, appendix B).

    Raises:
        ConfigError: one or more values are out of range; the message lists all of them.
    """

    output_dir: str | Path
    """Folder for checkpoints, `metrics.jsonl` and `run.json`; made if it does not exist."""
    max_steps: int
    """Optimizer steps in the run."""
    global_batch_tokens: int | None = None
    """Tokens a step, over all processes and micro-batches; one micro-batch a process if not given."""
    micro_batch_size: int | Literal["auto"] | None = None
    """Sequences a process runs through the model at once; the device's usual if not given.
    "auto": the most that fit in every process's memory, which is tried before the run; needs `global_batch_tokens`."""
    learning_rate: float = 6e-4
    """The schedule's peak."""
    warmup_steps: int | None = None
    """Steps of linear warm-up; a twentieth of `max_steps` if not given."""
    min_lr_ratio: float = 0.1
    """The schedule's floor, as a share of `learning_rate`."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay of the first and the second moment."""
    weight_decay: float = 0.1
    """AdamW's decay of matrices and embeddings; biases and layer norms have none."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm."""
    non_finite: NonFinitePolicy = "raise"
    """What to do with a step whose loss or gradient norm is not finite; its update is never applied."""
    non_finite_limit: int = 10
    """Steps in a row that may be left out."""
    loss_spike_zscore: float | None = None
    """Leave out a step whose loss is so many standard deviations above the last accepted ones' mean; none if not given.
    Not in fp16, whose scaler alone decides which steps are taken."""
    seed: int = 42
    """Of the order of samples and of dropout; and of the weights, where the Trainer or the command line makes them."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """"auto": what the launcher, or your own `Accelerator`, chose, else bf16 on a GPU or CPU that multiplies it, else
    none."""
    compile: bool | Literal["auto"] = "auto"
    """Whether to compile the model with torch.compile; "auto": on CUDA only."""
    activation_checkpointing: bool = False
    """Keep only each block's input for the backward pass and compute the rest again: less memory, a third slower."""
    collective_timeout_seconds: float = 600.0
    """How long a process waits for the others before it ends the run."""
    eval_every: int | None = None
    """Steps between evaluations; one at the end only if not given."""
    eval_batches: int | None = None
    """Micro-batches a process evaluates; the whole dataset if not given."""
    log_every: int = 10
    """Steps between two reports, each of which is made a step later: a GPU has that one to do meanwhile."""
    log_with: str | None = None
    """An Accelerate tracker besides `metrics.jsonl`: "tensorboard", "wandb", and so on, or "all" that are installed.
    An `Accelerator` of your own is given it itself: figures go to its trackers."""
    save_every: int | None = 500
    """Steps between checkpoints, of which there is always one at the end; with None that one only."""
    keep_last: int = 2
    """Newest checkpoints that are kept."""
    keep_every: int | None = None
    """Checkpoints at multiples of this step are kept for good."""
    gather_limit_bytes: int = 32_000_000_000
    """Under FSDP, the largest checkpoint (12 bytes a trained parameter) that the first process gathers and writes.
    Of a larger one every process writes what it has; `output_dir` must then be on a file system that all share.
    Both are opened, and gone on from, everywhere."""
    num_workers: int = 0
    """Processes that read ahead, for slow datasets of your own; an evaluation reads in the main process."""
    loader_timeout_seconds: float = 600.0
    """How long to wait for such a process."""

    def schedule(self) -> Schedule:
        """The learning rate's: a linear warm-up, then half a cosine."""
        warmup_steps = self.max_steps // 20 if self.warmup_steps is None else self.warmup_steps
        return warmup_cosine(warmup_steps=warmup_steps, max_steps=self.max_steps, min_lr_ratio=self.min_lr_ratio)

    def __post_init__(self) -> None:
        wrong = [
            f"{name}={value!r}: must be {rule}."
            for names, rule, holds in _RULES
            for name in names.split()
            if not holds(value := getattr(self, name))
        ]
        if self.micro_batch_size == "auto" and self.global_batch_tokens is None:
            wrong.append("micro_batch_size='auto': needs global_batch_tokens, for the step to stay the same.")
        if wrong:
            raise ConfigError("These settings cannot be used:\n  " + "\n  ".join(wrong))


def _is_count(value: object, *, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_positive(value: object) -> bool:
    return _is_number(value) and 0 < value <= _MOST


_MOST = 1e9
"""Of rates, and of seconds, of which more than some 10**14 have no date."""
_MOST_SEED = 4_000_000_000
"""NumPy's are below 2**32, and the process's number and the step are added to it."""

_RULES: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    ("output_dir", "a path", lambda value: isinstance(value, str | Path)),
    ("max_steps log_every keep_last", "a whole number of at least 1", lambda value: _is_count(value, least=1)),
    (
        "global_batch_tokens eval_every eval_batches save_every keep_every",
        "a whole number of at least 1, or None",
        lambda value: value is None or _is_count(value, least=1),
    ),
    (
        "micro_batch_size",
        "a whole number of at least 1, 'auto' or None",
        lambda value: value in (None, "auto") or _is_count(value, least=1),
    ),
    (
        "non_finite_limit gather_limit_bytes num_workers",
        "a whole number of at least 0",
        lambda value: _is_count(value, least=0),
    ),
    (
        "warmup_steps",
        "a whole number of at least 0, or None",
        lambda value: value is None or _is_count(value, least=0),
    ),
    ("seed", f"a whole number from 0 to {_MOST_SEED}", lambda value: _is_count(value, least=0) and value <= _MOST_SEED),
    (
        "learning_rate collective_timeout_seconds loader_timeout_seconds",
        f"a number above 0 and at most {_MOST:g}",
        _is_positive,
    ),
    (
        "loss_spike_zscore",
        f"a number above 0 and at most {_MOST:g}, or None",
        lambda value: value is None or _is_positive(value),
    ),
    ("max_grad_norm", "a number above 0", lambda value: _is_number(value) and value > 0),  # inf: no clipping
    ("weight_decay", "a finite number of at least 0", lambda value: _is_number(value) and 0 <= value < math.inf),
    ("min_lr_ratio", "a number between 0 and 1", lambda value: _is_number(value) and 0 <= value <= 1),
    (
        "betas",
        "two numbers of at least 0 and less than 1",
        lambda value: (
            isinstance(value, tuple | list)
            and len(value) == 2
            and all(_is_number(beta) and 0 <= beta < 1 for beta in value)
        ),
    ),
    ("activation_checkpointing", "True or False", lambda value: isinstance(value, bool)),
    ("compile", "one of 'auto', True, False", lambda value: value in ("auto", True, False)),
    ("mixed_precision", "one of 'auto', 'no', 'bf16', 'fp16'", lambda value: value in ("auto", "no", "bf16", "fp16")),
    ("non_finite", "one of 'raise', 'skip'", lambda value: value in ("raise", "skip")),
)
"""Names of settings, what they must be, and whether a value is that."""


def is_due(step: int, every: int | None) -> bool:
    """Whether something that is done every so many steps is done after this one."""
    return every is not None and step % every == 0


@dataclass(frozen=True)
class BatchPlan:
    """How a step's sequences are shared out: `global_batch_size` = processes · micro-batches · their size."""

    global_batch_size: int
    micro_batch_size: int
    accumulation_steps: int


def plan_batch(
    *,
    global_batch_tokens: int | None,
    micro_batch_size: int | None,
    block_size: int,
    num_processes: int,
    micro_batch_tokens: int,
) -> BatchPlan:
    """Work out accumulation from what the user states.

    Args:
        global_batch_tokens: tokens a step; one micro-batch a process if None.
        micro_batch_size: sequences at once in a process; if None, the largest divisor of a process's share of
            the step that stays within `micro_batch_tokens`.
        block_size: tokens in a sequence.
        num_processes: processes that share the step.
        micro_batch_tokens: what the device usually takes at once.

    Raises:
        ConfigError: the numbers do not divide; the message names the nearest that do.
    """
    if global_batch_tokens is None:
        size = micro_batch_size or max(1, micro_batch_tokens // block_size)
        return BatchPlan(size * num_processes, size, 1)
    unit = block_size * num_processes * (micro_batch_size or 1)
    if global_batch_tokens % unit:
        below, above = global_batch_tokens // unit * unit, (global_batch_tokens // unit + 1) * unit
        nearest = f"{below} and {above} are the nearest that do" if below else f"the smallest that does is {above}"
        raise ConfigError(
            f"global_batch_tokens={global_batch_tokens} does not divide into micro-batches of "
            f"{micro_batch_size or 1} × block_size {block_size} tokens on each of {num_processes} process(es): "
            f"{nearest}."
        )
    share = global_batch_tokens // (block_size * num_processes)
    if micro_batch_size is None:
        most = max(1, min(share, micro_batch_tokens // block_size))
        micro_batch_size = next(size for size in range(most, 0, -1) if share % size == 0)
    return BatchPlan(share * num_processes, micro_batch_size, share // micro_batch_size)
