"""Builds the parts of a Trainer. Each part has its own function, so that a test can build it alone."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

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
from homebrew.data.collate import Collate
from homebrew.data.loader import Batch, StepLoader
from homebrew.data.tokenizer import dataset_tokenizer
from homebrew.distributed.accelerator import build_accelerator, check_accelerator
from homebrew.distributed.fsdp import configure_fsdp, meta_copy, prepare, uses_fsdp
from homebrew.errors import ConfigError
from homebrew.evaluation.mean_loss import mean_loss
from homebrew.metrics.throughput import ThroughputMeter
from homebrew.model.gpt import GPT
from homebrew.model.gpt_config import GPTConfig
from homebrew.model.interfaces import interface_of
from homebrew.model.language_model import LanguageModel, ModelInterface
from homebrew.optim.averaged import AveragedOptimizer
from homebrew.optim.combined import combine, members
from homebrew.optim.muon import Muon
from homebrew.training.arguments import check_datasets, check_guard_settings, warn_of_stop_tokens
from homebrew.training.batch_size import BatchPlan, plan_batch_for_device
from homebrew.training.compile import EAGER_EVALUATION_FLOPS, CompileMode, compile_model, warm_up_compiled
from homebrew.training.global_settings import allow_tf32
from homebrew.training.nan_guard import NanGuard
from homebrew.training.optimizer import adamw, check_trainable, muon_and_adamw
from homebrew.training.optimizer_modes import OptimizerModes
from homebrew.training.optimizer_probe import check_future_state
from homebrew.training.schedule import Schedule, WarmupStableDecay, multiplier_at
from homebrew.training.step_logger import StepLogger
from homebrew.training.train_step import TrainStep
from homebrew.training.trainer_config import TrainerConfig

_MAX_BATCH_LENGTH = 2**24
"""Far above the length of any sequence."""


@dataclass(frozen=True)
class TrainerParts:
    """The parts of a Trainer."""

    accelerator: Accelerator
    model: nn.Module
    """The model without wrappers."""
    wrapped: nn.Module
    """The model as `Accelerator.prepare` returned it."""
    meta_copy: nn.Module | None
    """Under FSDP, a copy of the unsharded model whose weights take no memory."""
    optimizer: torch.optim.Optimizer
    """The optimizer without Accelerate's wrapper."""
    modes: OptimizerModes
    sequence_length: int
    batch: BatchPlan
    compile_mode: CompileMode
    guard: NanGuard
    train_step: TrainStep
    mean_loss: Callable[[Dataset[Any]], tuple[float, int]]
    """Evaluates the model on a dataset, as `evaluation.mean_loss` does."""
    warm_up_model: Callable[[Batch], None]
    """Compiles the model for batches like the given one."""
    loader: StepLoader
    logger: StepLogger
    checkpoints: CheckpointManager


def build_parts(
    model: LanguageModel | GPTConfig,
    train_dataset: Dataset[Any],
    eval_dataset: Dataset[Any] | None,
    *,
    config: TrainerConfig,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None,
    schedule: Schedule,
    accelerator: Accelerator | None,
) -> TrainerParts:
    """Check the arguments of a Trainer and build its parts. Nothing is trained or written.

    Raises:
        HomebrewError: A setting, the data or the launch is invalid.
    """
    if isinstance(optimizer, Sequence):
        optimizer = combine(optimizer)
    accelerator = resolve_accelerator(accelerator, config)
    device = accelerator.device
    allow_tf32(device)
    bare = GPT(model, seed=config.seed) if isinstance(model, GPTConfig) else cast("nn.Module", model)
    interface = interface_of(bare)
    sequence_length = check_datasets(interface, train_dataset, eval_dataset, eval_every=config.eval_every)
    warn_of_stop_tokens(interface, dataset_tokenizer(train_dataset))
    bare.to(device)
    meta = meta_copy(bare) if uses_fsdp(accelerator) else None
    if configure_fsdp(accelerator, bare) or config.activation_checkpointing:
        interface.enable_activation_checkpointing()
    with accelerator.autocast():  # some models cannot be called without, such as those with flash attention
        loss_function = interface.loss_function()
    batch = plan_batch_for_device(accelerator, bare, config, sequence_length, loss_function)
    flops = interface.flops_per_token(sequence_length) * sequence_length * batch.micro_batch_size
    compile_mode = compile_model(
        bare, config.compile, accelerator, batch, micro_batch_flops=flops, max_steps=config.max_steps
    )
    use_graphs = compile_mode in ("cuda_graphs", "captured")
    collate = build_collate(interface, sequence_length, compile_mode)

    check_trainable(bare, optimizer)
    if optimizer is not None:
        check_future_state(optimizer)
    optimizers = build_optimizers(bare, config) if optimizer is None else members(optimizer)
    for member in optimizers:
        if isinstance(member, Muon) and accelerator.mixed_precision == "bf16" and "cpu_dtype" not in vars(member):
            member.cpu_dtype = torch.bfloat16
    decay = config.ema_decay
    bare_optimizer = combine(optimizers) if decay is None else AveragedOptimizer(optimizers, decay)
    peak = max(float(group["lr"]) for group in bare_optimizer.param_groups)
    max_grad_norm = math.inf if config.max_grad_norm is None else config.max_grad_norm
    identity = run_identity(  # before FSDP shards the weights
        dataset=train_dataset,
        model=bare,
        optimizer=bare_optimizer,
        schedule=lambda step: multiplier_at(schedule, min(step, config.max_steps - 1), peak),  # the last step's
        max_steps=config.max_steps,
        max_grad_norm=max_grad_norm,
        global_batch_size=batch.global_batch_size,
        seed=config.seed,
        ema_decay=decay,
    )
    identity(config.max_steps)  # raises the errors of a custom schedule
    wrapped, prepared_optimizer = prepare(accelerator, bare, bare_optimizer)
    modes = OptimizerModes(bare_optimizer)

    uses_scaler = accelerator.scaler is not None
    check_guard_settings(config, uses_scaler=uses_scaler)
    guard = NanGuard(
        bare_optimizer,
        "skip" if uses_scaler else config.non_finite,  # fp16: overflowing steps are how the scaler finds its scale
        config.non_finite_limit,
        device,
        spike_zscore=config.loss_spike_zscore,
    )
    train_step = TrainStep(
        wrapped,
        # Only fp16's scaler needs Accelerate's wrapper, which costs a tenth of a small model's step time.
        prepared_optimizer if uses_scaler else bare_optimizer,
        guard,
        accelerator,
        loss_function=loss_function,
        max_grad_norm=max_grad_norm,
        accumulate_in_place=compile_mode == "captured" or (use_graphs and batch.accumulation_steps > 1),
        capture_passes=compile_mode == "captured",
        capture_update=use_graphs and optimizer is None and not uses_scaler,
    )
    evaluates_eagerly = use_graphs and flops < EAGER_EVALUATION_FLOPS
    return TrainerParts(
        accelerator=accelerator,
        model=bare,
        wrapped=wrapped,
        meta_copy=meta,
        optimizer=bare_optimizer,
        modes=modes,
        sequence_length=sequence_length,
        batch=batch,
        compile_mode=compile_mode,
        guard=guard,
        train_step=train_step,
        mean_loss=partial(
            mean_loss,
            accelerator,
            wrapped,
            micro_batch_size=batch.micro_batch_size,
            collate=collate,
            max_batches=config.eval_batches,
            eager=evaluates_eagerly,
            loss_function=loss_function,
        ),
        warm_up_model=partial(warm_up_compiled, accelerator, wrapped, loss_function=loss_function),
        loader=build_loader(config, train_dataset, batch, accelerator, collate),
        logger=build_logger(config, interface, batch, accelerator, guard, sequence_length=sequence_length),
        checkpoints=build_checkpoint_manager(
            config, accelerator, bare, bare_optimizer, guard, identity, schedule, train_dataset
        ),
    )


def build_optimizers(model: nn.Module, config: TrainerConfig) -> list[torch.optim.Optimizer]:
    """Build the optimizers that the config names."""
    settings = {name: config.effective(name) for name in ("learning_rate", "betas", "weight_decay")}
    if config.optimizer == "muon":
        return muon_and_adamw(model, momentum=config.effective("muon_momentum"), **settings)
    return [adamw(model.parameters(), **settings)]


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


def resolve_accelerator(accelerator: Accelerator | None, config: TrainerConfig) -> Accelerator:
    """Return the user's Accelerator after checking it, or a new one."""
    if accelerator is not None:
        if timeout := config.changed("collective_timeout_seconds"):
            raise ConfigError(
                f"{timeout} has no effect on an Accelerator that is already built. Build it with "
                f"kwargs_handlers=[InitProcessGroupKwargs(timeout=...)], and remove the setting."
            )
        return check_accelerator(accelerator, mixed_precision=config.mixed_precision, log_with=config.log_with)
    return build_accelerator(
        output_dir=config.output_dir,
        mixed_precision=config.mixed_precision,
        log_with=config.log_with,
        collective_timeout_seconds=config.collective_timeout_seconds,
    )


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
    return CheckpointManager(
        accelerator,
        model,
        optimizer,
        guard,
        output_dir=Path(config.output_dir),
        keep_last=config.keep_last,
        keep_every=config.keep_every,
        keep_before=schedule.decay_start if isinstance(schedule, WarmupStableDecay) else None,
        gather_limit_bytes=config.gather_limit_bytes,
        seed=config.seed,
        identity=identity,
        max_steps=config.max_steps,
        tokenizer=dataset_tokenizer(dataset),
    )
