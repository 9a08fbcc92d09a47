"""Validation of a Trainer's arguments, before anything is built from them."""

import inspect
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from homebrew.callbacks.base import Callback
from homebrew.data.tokenizer import Tokenizer
from homebrew.data.validation import check_dataset
from homebrew.errors import ConfigError
from homebrew.model.gpt_config import GPTConfig
from homebrew.model.interfaces import interface_of
from homebrew.model.language_model import LanguageModel, ModelInterface
from homebrew.training.schedule import Schedule, WarmupStableDecay
from homebrew.training.trainer_config import TrainerConfig
from homebrew.user_warnings import warn

_UNUSED_WITH = {
    "optimizer": ("optimizer", "learning_rate", "betas", "muon_momentum", "weight_decay"),
    "schedule": ("lr_schedule", "warmup_steps", "decay_fraction", "min_lr_ratio"),
}
"""Settings of the config in whose place an argument of the Trainer is used."""

_WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "FSDPModule", "OptimizedModule")
"""Classes of wrapped models, compared by name because importing some takes long. torch.compile returns the last."""

_OPTIMIZER = "a torch.optim.Optimizer. Build it over the model's parameters."


def check_arguments(
    model: LanguageModel | GPTConfig,
    config: TrainerConfig,
    optimizer: Optimizer | Sequence[Optimizer] | None,
    schedule: Schedule | None,
    accelerator: Accelerator | None,
    callbacks: Sequence[Callback],
    *,
    progress: bool,
) -> None:
    """Check all arguments of a Trainer but the datasets, which `data.validation` checks.

    Raises:
        ConfigError: An argument is of another type than the Trainer needs, or the Trainer cannot use it.
    """
    rules: tuple[tuple[str, object, type | tuple[type, ...], str], ...] = (
        (
            "model",
            model,
            (nn.Module, GPTConfig),
            "an nn.Module that follows LanguageModel, such as a GPT, or a GPTConfig",
        ),
        ("config", config, TrainerConfig, "a TrainerConfig. Pass TrainerConfig(output_dir=..., max_steps=...)"),
        ("optimizer", optimizer, (Optimizer, list, tuple, NoneType), f"{_OPTIMIZER} Pass several as a list"),
        ("accelerator", accelerator, (Accelerator, NoneType), "an Accelerator. Pass None to build it from the config"),
        ("callbacks", callbacks, (list, tuple), "a list of Callbacks. Pass [callback] for one, and [] for none"),
        ("progress", progress, bool, "True or False. A custom ProgressDisplay belongs to callbacks"),
    )
    for name, value, types, rule in rules:
        if not isinstance(value, types):
            raise ConfigError(f"{name} is {_describe(value)}, but must be {rule}.")
    if isinstance(model, nn.Module):
        check_model(model)
    if isinstance(optimizer, Sequence):
        check_optimizers(optimizer)
    elif optimizer is not None:
        check_optimizer(optimizer)
    if schedule is not None:
        check_schedule(schedule)
    for name, argument in (("optimizer", optimizer), ("schedule", schedule)):
        if argument is not None and (unused := config.changed(*_UNUSED_WITH[name])):
            raise ConfigError(
                f"{unused}: not used with a custom {name}. Set the value in the {name}, and remove it from the config."
            )
    check_callbacks(callbacks)
    warn_of_warmup(config)


def check_model(model: nn.Module) -> None:
    """Check that a model can be called by the Trainer, and has weights that can be trained.

    Raises:
        ConfigError: The model is wrapped, is of a kind that cannot be trained, or has a weight in float16.
    """
    if wrapper := next((c.__name__ for c in type(model).__mro__ if c.__name__ in _WRAPPERS), None):
        raise ConfigError(f"The model is wrapped in {wrapper}. Pass the model itself: the Trainer wraps it.")
    interface_of(model).check()
    for name, parameter in model.named_parameters():
        if parameter.dtype == torch.float16:
            raise ConfigError(
                f"The model's {name} is float16, in which small updates are lost. Call model.float(); with "
                f"mixed_precision='fp16' the model still computes in float16."
            )
    rounded = [name for name, p in model.named_parameters() if p.requires_grad and p.dtype == torch.bfloat16]
    if rounded:
        warn(
            f"{len(rounded)} trainable weights are bfloat16, such as {rounded[0]}, in which small updates are lost. "
            f"Call model.float(); with mixed_precision='bf16' the model still computes in bfloat16."
        )


def check_optimizers(optimizers: Sequence[Optimizer]) -> None:
    """Check a sequence of optimizers, of which each trains a part of the model.

    Raises:
        ConfigError: The sequence is empty, or an item is not an optimizer or not supported.
    """
    if not optimizers:
        raise ConfigError("optimizer is an empty list. Pass None for the optimizer that the config names.")
    for index, optimizer in enumerate(optimizers):
        if not isinstance(optimizer, Optimizer):
            raise ConfigError(f"optimizer[{index}] is {_describe(optimizer)}, but must be {_OPTIMIZER}")
        check_optimizer(optimizer)


def check_optimizer(optimizer: Optimizer) -> None:
    """Check that the Trainer can step an optimizer and set its learning rate.

    Raises:
        ConfigError: The optimizer is not supported.
    """
    name = type(optimizer).__name__
    if isinstance(optimizer, AcceleratedOptimizer):
        raise ConfigError("The optimizer was returned by Accelerator.prepare. Pass the optimizer itself.")
    if not _can_be_called(type(optimizer).step, optimizer):  # an LRScheduler replaces the instance's step
        raise ConfigError(
            f"{name}.step() needs arguments, such as a closure that computes the loss again, but the Trainer computes "
            f"the loss once and calls step(). Use an optimizer whose step() needs no arguments, such as AdamW."
        )
    for group in optimizer.param_groups:
        learning_rate = group.get("lr")
        try:
            is_valid = 0 <= float(learning_rate) < math.inf  # type: ignore[arg-type]  # None, for example
        except (TypeError, ValueError, OverflowError, RuntimeError):
            is_valid = False
        if not is_valid:
            raise ConfigError(
                f"{name} has lr={learning_rate!r} in a parameter group, but the schedule needs a finite number of at "
                f"least 0 to multiply. Set lr in the optimizer; for transformers' Adafactor, also relative_step=False."
            )
    if not any(float(group["lr"]) for group in optimizer.param_groups):
        raise ConfigError(
            f"{name} has lr=0, with which nothing is trained. Set lr; an LRScheduler with a warm-up sets it to 0: pass "
            f"a function as the Trainer's schedule instead."
        )


def check_schedule(schedule: Schedule) -> None:
    """Check that a schedule is a function of the step.

    Raises:
        ConfigError: The schedule is not callable with a step.
    """
    if not callable(schedule) or not _can_be_called(schedule, 0):
        raise ConfigError(
            f"schedule is {_describe(schedule)}, but must be a function from the step to the multiplier of the "
            f"learning rate. For example: schedule=lambda step: 0.99**step."
        )


def check_callbacks(callbacks: Sequence[Callback]) -> None:
    """Check the types of callbacks.

    Raises:
        ConfigError: An item is not a Callback.
    """
    for index, callback in enumerate(callbacks):
        if not isinstance(callback, Callback):
            raise ConfigError(
                f"callbacks[{index}] is {_describe(callback)}, but must be a Callback. Derive the class from "
                f"homebrew.Callback, and pass an instance."
            )


def check_datasets(
    model: ModelInterface, train_dataset: Dataset[Any], eval_dataset: Dataset[Any] | None, *, eval_every: int | None
) -> int:
    """Check that the model can read the datasets; return the length in tokens that each sample counts as."""
    limits = {"block_size": model.block_size, "vocab_size": model.vocab_size}
    lengths = check_dataset(train_dataset, "train_dataset", **limits)
    if eval_dataset is None and eval_every is not None:
        raise ConfigError(
            f"eval_every={eval_every}, but there is no eval_dataset. Pass eval_dataset, or remove eval_every."
        )
    if eval_dataset is not None:
        check_dataset(eval_dataset, "eval_dataset", **limits)
    return lengths[0] if len(lengths) == 1 else model.ragged_length or lengths[-1]


def warn_of_tokenizer(model: ModelInterface, tokenizer: Tokenizer | None) -> None:
    """Warn if the dataset's tokenizer does not seem to be the model's.

    Either the model's large vocabulary is at least ten times as large, or its `generate` stops at a token that is text.
    """
    if tokenizer is None:
        return
    if (model.vocab_size or 0) >= max(10_000, 10 * tokenizer.vocab_size):
        warn(
            f"The model has {model.vocab_size:,} tokens, but the tokenizer {tokenizer.name!r} of train_dataset only "
            f"{tokenizer.vocab_size:,}. The others take time and memory: build the model with "
            f"vocab_size=train_dataset.vocab_size."
        )
    for stop in model.stop_ids:
        if stop != tokenizer.end_of_text_id and 0 <= stop < tokenizer.vocab_size:
            text = tokenizer.decode([stop])
            if list(tokenizer.encode(text)) == [stop]:
                warn(
                    f"The model stops generating at the token {stop} (eos_token_id), which is {text!r} in the "
                    f"tokenizer {tokenizer.name!r} of train_dataset. Set eos_token_id={tokenizer.end_of_text_id} in "
                    f"the model's config and generation_config."
                )


def warn_of_warmup(config: TrainerConfig) -> None:
    """Warn if the default warm-up of "wsd", which does not depend on the length of the run, is too long for it."""
    schedule = config.schedule()
    if config.lr_schedule != "wsd" or config.warmup_steps is not None or not isinstance(schedule, WarmupStableDecay):
        return
    if schedule.warmup_steps > schedule.decay_start:
        warn(
            f"The learning rate does not reach its peak: the default warm-up of lr_schedule='wsd' takes "
            f"{schedule.warmup_steps} steps, but the decay starts at step {schedule.decay_start} of "
            f"max_steps={config.max_steps}. Set warmup_steps, for example to {config.max_steps // 8}."
        )


def check_guard_settings(config: TrainerConfig, *, uses_scaler: bool) -> None:
    """Raise ConfigError for settings of skipped steps that would have no effect."""
    limit, zscore = config.changed("non_finite_limit"), config.changed("loss_spike_zscore")
    if zscore and uses_scaler:
        raise ConfigError(
            f"{zscore} is not supported in fp16, where the gradient scaler decides which steps to skip. Remove it, or "
            f"use mixed_precision='bf16'."
        )
    if limit and not (zscore or uses_scaler or config.non_finite == "skip"):
        raise ConfigError(
            f"{limit} has no effect: the first non-finite step ends the run. Set non_finite='skip', or remove it."
        )


def check_start(resume: bool | str | Path, *, overwrite: bool) -> None:
    """Check that `Trainer.train` can start with these arguments.

    Raises:
        ConfigError: `resume` is empty, `resume` and `overwrite` are both given, or gradients are disabled.
    """
    if not torch.is_grad_enabled():
        raise ConfigError("train() was called under torch.no_grad() or torch.inference_mode(). Call it outside.")
    if resume == "":
        raise ConfigError("resume='' is not a path. Pass True, False, or the path of a checkpoint.")
    if overwrite and resume:
        raise ConfigError(
            f"overwrite=True starts a new run, and resume={str(resume)!r} continues one. Pass only one of them."
        )


def _can_be_called(function: Callable[..., Any], *arguments: object) -> bool:
    """Return whether a function takes these arguments, as far as its signature tells."""
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError:
        return False
    except ValueError:  # some functions written in C have no signature
        return True
    return True


def _describe(value: object) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}"
    text = repr(value)
    return f"of type {type(value).__name__}" if len(text) > 40 or "\n" in text else text
