"""Errors for arguments that do not exist: they suggest names, also for those of nanoGPT and transformers."""

import difflib
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

from homebrew.errors import ArgumentError

OTHER_NAMES = {
    "activation_checkpointing": "gradient_checkpointing",
    "betas": "beta1 beta2 adam_beta1 adam_beta2",
    "collective_timeout_seconds": "ddp_timeout",
    "compile": "torch_compile",
    "eval_batches": "eval_iters",
    "eval_every": "eval_interval eval_steps eval_strategy evaluation_strategy",
    "global_batch_tokens": "batch batch_tokens gradient_accumulation_steps",
    "keep_last": "save_total_limit",
    "learning_rate": "lr rate",
    "log_every": "log_interval logging_steps",
    "log_with": "report_to tracker wandb wandb_log tensorboard",
    "lr_schedule": "lr_scheduler_type decay_lr scheduler",
    "max_grad_norm": "grad_clip clip clip_norm",
    "max_steps": "steps num_steps iters iterations max_iters lr_decay_iters epochs num_epochs num_train_epochs",
    "micro_batch_size": "batch bs batch_size per_device_train_batch_size auto_find_batch_size",
    "min_lr_ratio": "min_lr",
    "mixed_precision": "precision dtype bf16 fp16 tf32 amp",
    "num_workers": "dataloader_num_workers",
    "optimizer": "optim",
    "output_dir": "out out_dir output save_dir",
    "save_every": "save_interval save_steps save_strategy checkpoint_every always_save_checkpoint",
    "warmup_steps": "warmup warmup_iters warmup_ratio",
    "weight_decay": "decay wd",
}
"""Names of the settings of `TrainerConfig` in other programs, such as nanoGPT and transformers."""

_OTHER_ARGUMENTS = {
    "model": "model_init",
    "config": "args",
    "train_dataset": "train_data data",
    "eval_dataset": "val_dataset eval_data val_data",
    "optimizer": "optimizers optimizer_cls_and_kwargs",
    "schedule": "scheduler lr_scheduler optimizers",
    "callbacks": "compute_metrics",
}
"""Names of the arguments of `Trainer` in other programs."""

_ADVICE = {
    "data_collator": "The Trainer pads and batches the samples of train_dataset itself.",
    "tokenizer": "The Trainer uses the tokenizer of train_dataset.",
    "processing_class": "The Trainer uses the tokenizer of train_dataset.",
    "block_size": "The sequence length is that of train_dataset.",
    "resume_from_checkpoint": "Use train(resume=True), or train(resume=...) with the path of a checkpoint.",
    "overwrite_output_dir": "Use train(overwrite=True).",
    "num_train_epochs": "Use max_steps, which is epochs * tokens / global_batch_tokens.",
    "gradient_accumulation_steps": "Use global_batch_tokens, the tokens of a step over all processes.",
    "min_lr": "Use min_lr_ratio, which is min_lr / learning_rate.",
    "decay_lr": "Choose the decay with lr_schedule, or use none with Trainer(..., schedule=lambda step: 1.0).",
    **dict.fromkeys(("n_layer", "n_head", "n_embd", "dropout", "vocab_size"), "It is a setting of GPTConfig."),
}
"""What to do instead, for arguments without an equal counterpart."""

P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C")


def explain_unknown_arguments(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function raise ArgumentError, with a suggestion, for keyword arguments that it does not have."""
    names = list(inspect.signature(function).parameters)[1:]

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        if unknown := [name for name in kwargs if name not in names]:
            called = function.__qualname__.removesuffix(".__init__")
            raise ArgumentError(" ".join(_explain(called, name, names) for name in unknown))
        return function(*args, **kwargs)

    return checked


def explain_unknown_fields(config: type[C]) -> type[C]:
    """Like `explain_unknown_arguments`, for the fields of a dataclass."""
    config.__init__ = explain_unknown_arguments(config.__init__)  # type: ignore[method-assign]
    return config


def similar_names(name: str, names: Sequence[str], other_names: dict[str, str]) -> list[str]:
    """Return the names that are called `name` in other programs, or else those that are spelled like it."""
    meant = [known for known in names if name in other_names.get(known, "").split()]
    return meant or difflib.get_close_matches(name, names, n=2)


def _explain(called: str, name: str, names: Sequence[str]) -> str:
    similar = similar_names(
        name.lower(), names, {n: f"{OTHER_NAMES.get(n, '')} {_OTHER_ARGUMENTS.get(n, '')}" for n in names}
    )
    if similar and name not in _ADVICE:
        advice = f"Did you mean {' or '.join(similar)}?"
    else:
        advice = _ADVICE.get(name, f"The arguments are {', '.join(names)}.")
    return f"{called} has no argument {name!r}. {advice}"
