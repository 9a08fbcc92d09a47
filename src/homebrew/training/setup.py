"""Builds a Trainer: checks its arguments, and puts its parts together."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import Dataset

from homebrew.checkpoint.manager import CheckpointManager
from homebrew.data.loader import Batch, StepLoader
from homebrew.data.tokenizer import dataset_tokenizer
from homebrew.distributed.accelerator import build_accelerator, check_accelerator
from homebrew.distributed.fsdp import configure_fsdp, meta_copy, prepare, uses_fsdp
from homebrew.errors import ConfigError
from homebrew.evaluation.mean_loss import mean_loss
from homebrew.model.gpt import GPT
from homebrew.model.gpt_config import GPTConfig
from homebrew.model.interfaces import interface_of
from homebrew.model.language_model import LanguageModel
from homebrew.optim.combined import combine
from homebrew.training.arguments import check_datasets, warn_of_tokenizer
from homebrew.training.batch_size import BatchPlan, plan_batch_for_device
from homebrew.training.compile import EAGER_EVALUATION_FLOPS, CompileMode, compile_model, warm_up_compiled
from homebrew.training.global_settings import allow_tf32
from homebrew.training.nan_guard import NanGuard
from homebrew.training.optimizer_modes import OptimizerModes
from homebrew.training.parts import (
    build_checkpoint_manager,
    build_collate,
    build_guard,
    build_identity,
    build_loader,
    build_logger,
    build_optimizer,
    gradient_limit,
)
from homebrew.training.schedule import Schedule
from homebrew.training.step_logger import StepLogger
from homebrew.training.train_step import TrainStep
from homebrew.training.trainer_config import TrainerConfig


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
    mean_loss: Callable[..., tuple[float, int]]
    """`evaluation.mean_loss` of the model, with all arguments but the dataset and `should_stop`."""
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
    allow_tf32(accelerator.device)
    bare = GPT(model, seed=config.seed) if isinstance(model, GPTConfig) else cast("nn.Module", model)
    interface = interface_of(bare)
    sequence_length = check_datasets(interface, train_dataset, eval_dataset, eval_every=config.eval_every)
    warn_of_tokenizer(interface, dataset_tokenizer(train_dataset))
    bare.to(accelerator.device)
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

    bare_optimizer = build_optimizer(config, bare, optimizer, accelerator)
    identity = build_identity(config, bare, bare_optimizer, schedule, batch, train_dataset)  # before FSDP shards it
    wrapped, prepared_optimizer = prepare(accelerator, bare, bare_optimizer)
    modes = OptimizerModes(bare_optimizer)
    guard = build_guard(config, bare_optimizer, accelerator)
    uses_scaler = accelerator.scaler is not None
    train_step = TrainStep(
        wrapped,
        # Only fp16's scaler needs Accelerate's wrapper, which costs a tenth of a small model's step time.
        prepared_optimizer if uses_scaler else bare_optimizer,
        guard,
        accelerator,
        loss_function=loss_function,
        max_grad_norm=gradient_limit(config),
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
