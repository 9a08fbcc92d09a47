"""Builds the parts of a Trainer, each by its own function."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import Dataset

from homebrew.callbacks.base import Callback
from homebrew.callbacks.curve_plot import CurvePlot
from homebrew.callbacks.progress import ProgressDisplay
from homebrew.callbacks.run_logger import RunLogger
from homebrew.checkpoint.compatibility import Identity, run_identity
from homebrew.checkpoint.manager import CheckpointManager
from homebrew.checkpoint.state_dict import RunState
from homebrew.checkpoint.store import CheckpointStore
from homebrew.data.collate import Collate
from homebrew.data.loader import StepLoader
from homebrew.data.tokenizer import dataset_tokenizer
from homebrew.metrics.throughput import ThroughputMeter
from homebrew.model.language_model import ModelInterface
from homebrew.optim.averaged import AveragedOptimizer
from homebrew.optim.combined import combine, members
from homebrew.optim.muon import Muon
from homebrew.training.arguments import check_guard_settings
from homebrew.training.batch_size import BatchPlan
from homebrew.training.compile import CompileMode
from homebrew.training.nan_guard import NanGuard
from homebrew.training.optimizer import adamw, check_trainable, muon_and_adamw
from homebrew.training.schedule import Schedule, WarmupStableDecay, multiplier_at
from homebrew.training.step_logger import StepLogger
from homebrew.training.trainer_config import TrainerConfig

_MAX_BATCH_LENGTH = 2**24
"""Far above the length of any sequence."""


def build_callbacks(callbacks: Sequence[Callback], *, progress: bool) -> list[Callback]:
    """Return the built-in callbacks, followed by the user's.

    Args:
        callbacks: The user's callbacks. A `ProgressDisplay`, `RunLogger` or `CurvePlot` among them replaces the
            built-in one.
        progress: Whether to show the progress display.
    """
    builtin: list[Callback] = [ProgressDisplay()] if progress else []
    builtin += [RunLogger(), CurvePlot()]
    return [b for b in builtin if not any(isinstance(c, type(b)) for c in callbacks)] + list(callbacks)


def build_collate(model: ModelInterface, sequence_length: int, compile_mode: CompileMode) -> Collate:
    """Build what makes batches of samples: for a compiled model, batches of few lengths."""
    lengths: list[int] = []
    if compile_mode != "none" and model.ragged_length is not None:
        lengths = [sequence_length, model.ragged_length]
    elif compile_mode != "none":
        most = model.block_size or _MAX_BATCH_LENGTH
        lengths = [n for n in (sequence_length << i for i in range(32)) if n < most] + [most]
    return Collate(vocab_size=model.vocab_size, block_size=model.block_size, lengths=tuple(lengths))


def build_loader(
    config: TrainerConfig, dataset: Dataset[Any], batch: BatchPlan, accelerator: Accelerator, collate: Collate
) -> StepLoader:
    """Build the loader of this rank's micro-batches."""
    return StepLoader(
        dataset,
        seed=config.seed,
        global_batch_size=batch.global_batch_size,
        micro_batch_size=batch.micro_batch_size,
        rank=accelerator.process_index,
        num_ranks=accelerator.num_processes,
        device=accelerator.device,
        num_workers=config.num_workers,
        timeout_seconds=config.loader_timeout_seconds,
        collate=collate,
    )


def build_optimizer(
    config: TrainerConfig,
    model: nn.Module,
    custom: torch.optim.Optimizer | None,
    accelerator: Accelerator,
) -> torch.optim.Optimizer:
    """Check the user's optimizer, or build those that the config names, and let it average weights if wanted."""
    check_trainable(model, custom)
    optimizers = _optimizers_of(config, model) if custom is None else members(custom)
    for member in optimizers:
        if isinstance(member, Muon) and accelerator.mixed_precision == "bf16" and "cpu_dtype" not in vars(member):
            member.cpu_dtype = torch.bfloat16
    return combine(optimizers) if config.ema_decay is None else AveragedOptimizer(optimizers, config.ema_decay)


def _optimizers_of(config: TrainerConfig, model: nn.Module) -> list[torch.optim.Optimizer]:
    settings = {name: config.effective(name) for name in ("learning_rate", "betas", "weight_decay")}
    if config.optimizer == "muon":
        return muon_and_adamw(model, momentum=config.effective("muon_momentum"), **settings)
    return [adamw(model.parameters(), **settings)]


def build_guard(config: TrainerConfig, optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> NanGuard:
    """Build what finds steps that are not finite."""
    uses_scaler = accelerator.scaler is not None
    check_guard_settings(config, uses_scaler=uses_scaler)
    return NanGuard(
        optimizer,
        "skip" if uses_scaler else config.non_finite,  # fp16: overflowing steps are how the scaler finds its scale
        config.non_finite_limit,
        accelerator.device,
        spike_zscore=config.loss_spike_zscore,
    )


def build_identity(
    config: TrainerConfig,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    batch: BatchPlan,
    dataset: Dataset[Any],
) -> Identity:
    """Build what a checkpoint is compared with before it is resumed. The model must not be sharded yet.

    Raises:
        ConfigError: A custom schedule returns no valid multiplier.
    """
    peak = max(float(group["lr"]) for group in optimizer.param_groups)
    identity = run_identity(
        dataset=dataset,
        model=model,
        optimizer=optimizer,
        schedule=lambda step: multiplier_at(schedule, min(step, config.max_steps - 1), peak),  # the last step's
        max_steps=config.max_steps,
        max_grad_norm=gradient_limit(config),
        global_batch_size=batch.global_batch_size,
        seed=config.seed,
        ema_decay=config.ema_decay,
    )
    identity(config.max_steps)  # raises the errors of a custom schedule
    return identity


def gradient_limit(config: TrainerConfig) -> float:
    """Return the norm that gradients are clipped to, which is infinite if they are not clipped."""
    return math.inf if config.max_grad_norm is None else config.max_grad_norm


def build_logger(
    config: TrainerConfig,
    model: ModelInterface,
    batch: BatchPlan,
    accelerator: Accelerator,
    guard: NanGuard,
    *,
    sequence_length: int,
) -> StepLogger:
    """Build the step logger and its throughput meter."""
    meter = ThroughputMeter(
        tokens_per_step=batch.global_batch_size * sequence_length,
        flops_per_token=model.flops_per_token(sequence_length),
        device=accelerator.device,
        dtype={"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.float32),
        num_processes=accelerator.num_processes,
    )
    return StepLogger(guard, meter, accelerator.device, log_every=config.log_every, max_steps=config.max_steps)


def build_checkpoint_manager(
    config: TrainerConfig,
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    guard: NanGuard,
    identity: Identity,
    schedule: Schedule,
    dataset: Dataset[Any],
) -> CheckpointManager:
    """Build the manager of the run's checkpoints."""
    store = CheckpointStore(
        config.output_dir,
        keep_last=config.keep_last,
        keep_every=config.keep_every,
        keep_before=schedule.decay_start if isinstance(schedule, WarmupStableDecay) else None,
    )
    return CheckpointManager(
        RunState(accelerator, model, optimizer, guard),
        store,
        gather_limit_bytes=config.gather_limit_bytes,
        seed=config.seed,
        identity=identity,
        max_steps=config.max_steps,
        tokenizer=dataset_tokenizer(dataset),
    )
