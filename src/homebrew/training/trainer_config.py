"""Training configuration."""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeGuard, get_args, get_type_hints

from homebrew.errors import ConfigError
from homebrew.io import absolute_path
from homebrew.training.schedule import Schedule, warmup_cosine, warmup_stable_decay
from homebrew.training.unknown_arguments import explain_unknown_fields

NonFinitePolicy = Literal["raise", "skip"]


@explain_unknown_fields
@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Training configuration; the defaults are those of GPT-3's smallest model (Brown et al. 2020, appendix B).

    Raises:
        ConfigError: Values are out of range or settings contradict each other. The message lists all problems.
    """

    output_dir: str | Path
    """Folder for checkpoints, `metrics.jsonl` and `run.json`; created if it does not exist. Stored as an absolute path,
    with the home directory for `~`."""
    max_steps: int
    """Number of optimizer steps in the run."""
    global_batch_tokens: int | None = None
    """Tokens in an optimizer step, over all processes and micro-batches. Default: one micro-batch per process."""
    micro_batch_size: int | Literal["auto"] | None = None
    """Sequences in a forward and backward pass of one process. Default: by device and model. "auto" finds the largest
    number that fits in every process's memory before training; needs `global_batch_tokens`."""
    optimizer: Literal["adamw", "muon"] | None = None
    """"adamw", the default: AdamW for all parameters. "muon": Muon for the matrices of the blocks, AdamW for
    embeddings, biases and layer norms. Muon needs fewer steps to train a new model on much data. Fine-tuning usually
    uses AdamW."""
    learning_rate: float | None = None
    """Peak learning rate of the built-in optimizer. Default: 6e-4 for AdamW, 4e-3 for Muon."""
    lr_schedule: Literal["cosine", "linear", "wsd"] | None = None
    """Learning rate after the warm-up. "cosine", the default: half a cosine; "linear": linear decay over the whole run;
    "wsd" (warm-up, stable, decay): constant, then linear decay over the last `decay_fraction` of the run. Until this
    decay begins, a run can be extended."""
    warmup_steps: int | None = None
    """Number of linear warm-up steps. Default: 100; for "cosine" and "linear" a twentieth of `max_steps` if that is
    more, and at most a quarter."""
    decay_fraction: float | None = None
    """Length of the decay with "wsd", as a fraction of `max_steps`. Default: 0.3."""
    min_lr_ratio: float | None = None
    """Final learning rate, as a fraction of `learning_rate`. Default: 0.1 for "cosine", otherwise 0."""
    betas: tuple[float, float] | None = None
    """AdamW's decay of the first and second moments. Default: 0.9 and 0.95."""
    ema_decay: float | None = None
    """Decay of an exponential moving average of the weights, such as 0.99. Evaluation, samples and checkpoints use the
    average instead of the last weights. It helps if the learning rate does not end at 0. Default: no average."""
    muon_momentum: float | None = None
    """Muon's decay of the gradients' running mean. Default: 0.95."""
    weight_decay: float | None = None
    """Weight decay of matrices and embeddings, for both optimizers; biases and layer norms are not decayed. Default:
    0.1."""
    max_grad_norm: float | None = 1.0
    """Gradients are clipped to this global norm. None, or infinity, disables clipping."""
    non_finite: NonFinitePolicy = "raise"
    """What to do if a loss or gradient norm is not finite: "raise" ends the run, "skip" skips the step. The update is
    never applied. In fp16, always "skip", because the gradient scaler depends on skipped steps."""
    non_finite_limit: int = 10
    """Maximum number of consecutive skipped steps."""
    loss_spike_zscore: float | None = None
    """Skip a step whose loss is more than this many standard deviations above the running mean. Default: never. Not
    supported in fp16, where the gradient scaler decides which steps to skip."""
    seed: int = 42
    """Random seed for data order and dropout, and for the initial weights of a model that the Trainer creates."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """"auto": bf16 or fp16 if the launcher was asked for it, else the precision of a custom `Accelerator`, else bf16 on
    hardware with native bfloat16, else "no" (float32). The launcher's "no" is its default and does not count."""
    compile: bool | Literal["auto"] = "auto"
    """Whether to compile the model with torch.compile. "auto" compiles on CUDA, except that short runs of a GPT
    compile only its blocks, which takes less time, and short runs of a small GPT compile nothing. True
    compiles the whole model."""
    activation_checkpointing: bool = False
    """Store only each block's input for the backward pass and recompute the rest: less memory, a third slower."""
    collective_timeout_seconds: float = 600.0
    """Timeout of collective operations, in seconds: the longest time that a process waits for the others."""
    eval_every: int | None = None
    """Steps between evaluations. Default: evaluate only at the end."""
    eval_batches: int | None = None
    """Micro-batches that each process evaluates. Default: the full evaluation dataset."""
    log_every: int = 10
    """Steps between log entries. Each is written one step late, so that the host does not wait for the GPU."""
    log_with: str | None = None
    """Accelerate tracker to log to besides `metrics.jsonl`: "tensorboard", "wandb", …, or "all" for every installed
    tracker. A custom `Accelerator` brings its own trackers instead."""
    save_every: int | None = 500
    """Steps between checkpoints; None saves only at the end. A checkpoint is always saved at the end."""
    keep_last: int = 2
    """Number of newest checkpoints to keep. The one with the lowest validation loss is kept too and, with "wsd", the
    last one from before the decay, from which the run can be extended."""
    keep_every: int | None = None
    """Keep checkpoints permanently at multiples of this number of steps, which is a multiple of `save_every`."""
    gather_limit_bytes: int = 32_000_000_000
    """Under FSDP, the largest checkpoint, in bytes (12 per trainable parameter, with `ema_decay` 20), that rank 0
    gathers and writes. For a larger checkpoint, each rank writes its shards, and `output_dir` must be on a shared file
    system. Both kinds load on any number of processes."""
    num_workers: int = 0
    """Data loader processes, for slow custom datasets. Evaluation always reads in the main process."""
    loader_timeout_seconds: float = 600.0
    """Timeout for a data loader process, in seconds."""

    def effective(self, name: str) -> Any:  # noqa: ANN401 - of the setting's type
        """Return the value of a setting, or what is used in its place if it is None."""
        is_muon, is_wsd = self.optimizer == "muon", self.lr_schedule == "wsd"
        defaults = {
            "optimizer": "adamw",
            "learning_rate": 4e-3 if is_muon else 6e-4,
            "lr_schedule": "cosine",
            # With "wsd" independent of max_steps, or a longer run would have another past.
            "warmup_steps": 100 if is_wsd else min(self.max_steps // 4, max(100, self.max_steps // 20)),
            "decay_fraction": 0.3,
            "min_lr_ratio": 0.1 if self.lr_schedule in (None, "cosine") else 0.0,
            "betas": (0.9, 0.95),
            "muon_momentum": 0.95,
            "weight_decay": 0.1,
        }
        value = getattr(self, name)
        return defaults.get(name) if value is None else value

    def schedule(self) -> Schedule:
        """Return the schedule that `lr_schedule` names."""
        warmup_steps, min_lr_ratio = self.effective("warmup_steps"), self.effective("min_lr_ratio")
        if self.effective("lr_schedule") == "cosine":
            return warmup_cosine(warmup_steps=warmup_steps, max_steps=self.max_steps, min_lr_ratio=min_lr_ratio)
        return warmup_stable_decay(
            warmup_steps=warmup_steps,
            max_steps=self.max_steps,
            decay_fraction=1.0 if self.lr_schedule == "linear" else self.effective("decay_fraction"),
            min_lr_ratio=min_lr_ratio,
        )

    def changed(self, *names: str) -> str:
        """Return those of the named settings that do not have their defaults, as "betas=(0.9, 0.99), seed=1"."""
        values = {name: getattr(self, name) for name in names}
        return ", ".join(f"{name}={value!r}" for name, value in values.items() if value != getattr(type(self), name))

    def __post_init__(self) -> None:
        problems = [
            f"{name}={value!r}: must be {rule}{', or None' if name in _OPTIONAL else ''}."
            for names, rule, holds in _RULES
            for name in names.split()
            if not (holds(value := getattr(self, name)) or (value is None and name in _OPTIONAL))
        ]
        if _is_one_of(self.micro_batch_size, "auto") and self.global_batch_tokens is None:
            problems.append("micro_batch_size='auto': needs global_batch_tokens.")
        if self.decay_fraction is not None and self.lr_schedule != "wsd":
            problems.append(f"decay_fraction={self.decay_fraction!r}: needs lr_schedule='wsd'; otherwise remove it.")
        if self.muon_momentum is not None and self.optimizer != "muon":
            problems.append(f"muon_momentum={self.muon_momentum!r}: needs optimizer='muon'; otherwise remove it.")
        if not problems and self.warmup_steps is not None and self.warmup_steps > self.max_steps:
            problems.append(f"warmup_steps={self.warmup_steps}: must be at most max_steps={self.max_steps}.")
        if not problems and self.keep_every is not None and (not self.save_every or self.keep_every % self.save_every):
            problems.append(
                f"keep_every={self.keep_every}: must be a multiple of save_every={self.save_every}, because only saved "
                f"checkpoints can be kept."
            )
        if problems:
            raise ConfigError("Invalid settings:\n  " + "\n  ".join(problems))
        object.__setattr__(self, "output_dir", absolute_path(self.output_dir))


def _is_count(value: object, *, minimum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def _is_number(value: object) -> TypeGuard[int | float]:
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) <= sys.float_info.max  # a larger one overflows
    return isinstance(value, float)


def _is_batch(value: object) -> bool:
    return _is_count(value, minimum=1) and value <= _MAX_BATCH  # type: ignore[operator]


def _is_one_of(value: object, *choices: str) -> bool:
    return isinstance(value, str) and value in choices  # an array cannot be compared


def _is_decay(value: object) -> bool:
    return _is_number(value) and 0 <= value < 1


_MAX_NUMBER = 1e9
"""Upper bound of learning rates and timeouts; `timedelta` overflows far above it."""
_MAX_BATCH = 1_000_000_000
"""Upper bound of a step's tokens, whose samples' indices have to fit in memory."""
_MAX_SEED = 4_000_000_000
"""NumPy's seeds are below 2**32, and the rank and the step are added to the seed."""

_RULES: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    (
        "output_dir",
        "a path that is not empty",
        lambda value: isinstance(value, str | Path) and value != "" and "\0" not in str(value),
    ),
    (
        "max_steps eval_every eval_batches log_every save_every keep_last keep_every",
        "an integer of at least 1",
        lambda value: _is_count(value, minimum=1),
    ),
    (
        "warmup_steps non_finite_limit gather_limit_bytes num_workers",
        "an integer of at least 0",
        lambda value: _is_count(value, minimum=0),
    ),
    ("global_batch_tokens", f"an integer from 1 to {_MAX_BATCH}", _is_batch),
    (
        "micro_batch_size",
        f"an integer from 1 to {_MAX_BATCH} or 'auto'",
        lambda value: _is_one_of(value, "auto") or _is_batch(value),
    ),
    ("seed", f"an integer from 0 to {_MAX_SEED}", lambda value: _is_count(value, minimum=0) and value <= _MAX_SEED),
    (
        "learning_rate loss_spike_zscore collective_timeout_seconds loader_timeout_seconds",
        f"a number above 0 and at most {_MAX_NUMBER:g}",
        lambda value: _is_number(value) and 0 < value <= _MAX_NUMBER,
    ),
    ("max_grad_norm", "a number above 0", lambda value: _is_number(value) and value > 0),
    ("weight_decay", "a finite number of at least 0", lambda value: _is_number(value) and 0 <= value < math.inf),
    ("decay_fraction min_lr_ratio", "a number between 0 and 1", lambda value: _is_number(value) and 0 <= value <= 1),
    ("ema_decay muon_momentum", "a number of at least 0 and less than 1", _is_decay),
    (
        "betas",
        "two numbers of at least 0 and less than 1",
        lambda value: isinstance(value, tuple | list) and len(value) == 2 and all(map(_is_decay, value)),
    ),
    ("optimizer", "one of 'adamw', 'muon'", lambda value: _is_one_of(value, "adamw", "muon")),
    ("lr_schedule", "one of 'cosine', 'linear', 'wsd'", lambda value: _is_one_of(value, "cosine", "linear", "wsd")),
    ("non_finite", "one of 'raise', 'skip'", lambda value: _is_one_of(value, "raise", "skip")),
    (
        "mixed_precision",
        "one of 'auto', 'no', 'bf16', 'fp16'",
        lambda value: _is_one_of(value, "auto", "no", "bf16", "fp16"),
    ),
    ("compile", "one of 'auto', True, False", lambda value: isinstance(value, bool) or _is_one_of(value, "auto")),
    ("activation_checkpointing", "True or False", lambda value: isinstance(value, bool)),
)
"""Names of settings, the rule their values must follow, and a predicate for the rule. `_OPTIONAL` may be None, too."""

_OPTIONAL = {name for name, hint in get_type_hints(TrainerConfig).items() if NoneType in get_args(hint)}
"""Settings whose type has None."""
