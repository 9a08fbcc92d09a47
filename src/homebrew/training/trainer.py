"""The Trainer: a run that reads top to bottom."""

from collections.abc import Collection, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import Dataset

from homebrew.callbacks.base import Callback, ProgressDisplay
from homebrew.callbacks.run_logger import RunLogger
from homebrew.checkpoint.compatibility import run_identity
from homebrew.data.loader import StepLoader, explain_worker_errors
from homebrew.data.tokenizer import dataset_tokenizer, default_prompt
from homebrew.data.validation import check_dataset
from homebrew.distributed.accelerator import build_accelerator, check_accelerator
from homebrew.distributed.fsdp import configure_fsdp, gather_full_model, meta_copy, uses_fsdp
from homebrew.distributed.signals import HANDLED_SIGNALS, FlagExchange, SignalHandler, ends, leave
from homebrew.errors import ConfigError, TrainingError
from homebrew.evaluation.mean_loss import mean_loss
from homebrew.metrics.step_metrics import EvalMetrics
from homebrew.metrics.throughput import ThroughputMeter
from homebrew.model.gpt import GPT
from homebrew.model.gpt_config import GPTConfig
from homebrew.training.batch_size import explain_out_of_memory, plan_batch_for_device
from homebrew.training.compile import EAGER_EVALUATION_FLOPS, compile_model, warm_up_compiled
from homebrew.training.nan_guard import NanGuard
from homebrew.training.optimizer import adamw, check_trainable
from homebrew.training.schedule import Schedule
from homebrew.training.train_step import TrainStep
from homebrew.training.trainer_config import TrainerConfig, is_due


class Trainer:
    """Trains a GPT on Accelerate: one script for a laptop, a notebook, a GPU or many.

    Args:
        model: what to train, in place; or its shape, for a new one with weights from the config's seed.
        train_dataset: a `TokenDataset`, or any map-style dataset of (input_ids, targets), each (T,), int64.
        eval_dataset: the same, to evaluate on.
        config: the run's settings.
        optimizer: used instead of AdamW; built over the model's parameters.
        schedule: a function step -> factor of the learning rate, used instead of `warmup_cosine`.
        accelerator: used instead of one with the launcher's settings, with the precision and the trackers it has.
        callbacks: told of the run's events, after the progress display.

    Raises:
        HomebrewError: a setting, the data or the launch cannot be used; nothing has been trained or written.
    """

    def __init__(
        self,
        model: GPT | GPTConfig,
        train_dataset: Dataset[Any],
        eval_dataset: Dataset[Any] | None = None,
        *,
        config: TrainerConfig,
        optimizer: torch.optim.Optimizer | None = None,
        schedule: Schedule | None = None,
        accelerator: Accelerator | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.config = config
        self.accelerator = (
            check_accelerator(accelerator, mixed_precision=config.mixed_precision, log_with=config.log_with)
            if accelerator
            else build_accelerator(
                output_dir=config.output_dir,
                mixed_precision=config.mixed_precision,
                log_with=config.log_with,
                collective_timeout_seconds=config.collective_timeout_seconds,
            )
        )
        self.model = GPT(model, seed=config.seed) if isinstance(model, GPTConfig) else model
        self.train_dataset = train_dataset
        self.eval_dataset = eval_dataset
        self._tokenizer = dataset_tokenizer(train_dataset)
        self._limits = {"block_size": self.model.config.block_size, "vocab_size": self.model.config.vocab_size}
        self.sequence_length = check_dataset(train_dataset, "train_dataset", **self._limits)
        if eval_dataset is not None:
            check_dataset(eval_dataset, "eval_dataset", **self._limits)
        self.schedule = schedule or config.schedule()
        self.step = 0
        """Optimizer steps taken."""
        self.should_stop = False
        """Set by a callback, on any process, to end the run after this step, or the next if there are several."""
        self._stopping = self._running = False  # agreed on by all processes; in `train`
        self._unreported: tuple[int, float] | None = None  # a step whose numbers are on their way, its learning rate
        self.callbacks = [ProgressDisplay(), RunLogger(), *callbacks]
        self._prepare(optimizer)

    def _prepare(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Place, compile and wrap the model."""
        from homebrew.checkpoint.manager import CheckpointManager

        config, accelerator = self.config, self.accelerator
        if accelerator.device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32 where a product stays in float32
        self.model.to(accelerator.device)
        self._empty_copy = meta_copy(self.model) if uses_fsdp(accelerator) else None
        if configure_fsdp(accelerator) or config.activation_checkpointing:
            self.model.enable_activation_checkpointing()
        self.batch = plan_batch_for_device(accelerator, self.model, config, self.sequence_length)
        work = self.model.flops_per_token(self.sequence_length) * self.sequence_length * self.batch.micro_batch_size
        compiled = compile_model(self.model, config.compile, accelerator, self.batch, micro_batch_flops=work)
        self._untried, as_graphs = compiled != "no", compiled == "as graphs"
        self._evaluates_eagerly = as_graphs and work < EAGER_EVALUATION_FLOPS
        check_trainable(self.model, optimizer)
        self._optimizer = optimizer or adamw(
            self.model, learning_rate=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
        )
        run = run_identity(  # before the weights may be shared out
            dataset=self.train_dataset,
            model=self.model,
            optimizer=self._optimizer,
            schedule=self.schedule,
            max_steps=config.max_steps,
            max_grad_norm=config.max_grad_norm,
            global_batch_size=self.batch.global_batch_size,
            seed=config.seed,
        )
        self._peak_lrs = [float(group["lr"]) for group in self._optimizer.param_groups]
        self._wrapped, prepared = accelerator.prepare(self.model, self._optimizer)
        scaled = accelerator.scaler is not None
        self._guard = NanGuard(
            self._optimizer,
            "skip" if scaled else config.non_finite,  # the scaler finds its scale by steps that overflow
            config.non_finite_limit,
            accelerator.device,
            spike_zscore=None if scaled else config.loss_spike_zscore,
        )
        self._take_step = TrainStep(
            self._wrapped,
            # Accelerate's optimizer is there for fp16's scaler; around it a small model's step takes a tenth longer.
            prepared if scaled else self._optimizer,
            self._guard,
            accelerator,
            max_grad_norm=config.max_grad_norm,
            sums_in_place=as_graphs and self.batch.accumulation_steps > 1,
            update_as_graph=as_graphs and optimizer is None and not scaled,
        )
        saved = (self.model, self._wrapped, self._optimizer, self._guard)
        self._saver = CheckpointManager(
            accelerator,
            *saved,
            output_dir=Path(config.output_dir),
            keep_last=config.keep_last,
            keep_every=config.keep_every,
            gather_limit_bytes=config.gather_limit_bytes,
            timeout_seconds=config.collective_timeout_seconds,
            seed=config.seed,
            identity=run,
            tokenizer=self._tokenizer,
        )
        self._loader = StepLoader(
            self.train_dataset,
            seed=config.seed,
            global_batch_size=self.batch.global_batch_size,
            micro_batch_size=self.batch.micro_batch_size,
            rank=accelerator.process_index,
            num_ranks=accelerator.num_processes,
            device=accelerator.device,
            num_workers=config.num_workers,
            timeout_seconds=config.loader_timeout_seconds,
            vocab_size=self.model.config.vocab_size,
        )
        self._meter = ThroughputMeter(
            tokens_per_step=self.batch.global_batch_size * self.sequence_length,
            flops_per_token=self.model.flops_per_token(self.sequence_length),
            device=accelerator.device,
            dtype={"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.float32),
            num_processes=accelerator.num_processes,
        )

    def train(self, resume: bool | str | Path = False, *, accept_changes: Collection[str] = ()) -> None:
        """Train to `max_steps`, evaluating and saving as configured, and at the end.

        Args:
            resume: True goes on from `output_dir`'s newest whole checkpoint, if there is one; a path from that one.
            accept_changes: what may differ from the run that saved: "dataset", "model", "adapter", "optimizer",
                "schedule", "global_batch_size", "seed".

        Raises:
            ConfigError: `output_dir` cannot be written, or holds a run and `resume` is False or an older checkpoint's.
            CheckpointError: the checkpoint is damaged or belongs to another run.
            NonFiniteError: a loss or gradient was not finite and the policy does not allow it.
        """
        self._begin(resume, accept_changes)
        try:
            self._tell("on_train_begin")
            self._running = True
            agreement = FlagExchange(self.accelerator)
            with (
                self._saver,
                SignalHandler() as signals,
                explain_out_of_memory(self.accelerator, self.batch),
                explain_worker_errors(self.config.loader_timeout_seconds),
                closing(self._loader.steps(self.step)) as steps,
            ):
                for micro_batches in steps:
                    if self.step >= self.config.max_steps or self._stopping:
                        break
                    if self._untried:
                        self._untried, evaluates = False, self.eval_dataset is not None and not self._evaluates_eagerly
                        with self._meter.paused():
                            warm_up_compiled(self.accelerator, self._wrapped, micro_batches[0], evaluates=evaluates)
                    self._set_rates(float(self.schedule(self.step)))
                    self._guard.record(self.step, self._take_step(micro_batches))
                    self.step += 1
                    self._after_step()
                    self._answer(signals, agreement)
                self._answer(signals, agreement)  # what came in the last step
                self.save()
                self._saver.wait()
        finally:
            self._running, self._unreported = False, None
            self._set_rates(1.0)  # an optimizer of your own is given back as it was
            self._tell("on_train_end")

    def _begin(self, resume: bool | str | Path, accept_changes: Collection[str]) -> None:
        """Bring everything to where the run starts or goes on."""
        if self._take_step.broken_off and uses_fsdp(self.accelerator):
            # It may still hold half a gradient, and let no other in.
            raise TrainingError("A step was broken off, after which FSDP cannot go on: build a new Trainer.")
        self._take_step.begin()  # with gradients there, PyTorch would not load an optimizer's state
        self._guard.reset()
        self.step = self._saver.begin(resume, accept_changes)
        self.accelerator.step = 0  # counts micro-batches; an interrupted step may have left it anywhere
        self._wrapped.train()
        self.should_stop = self._stopping = False
        self._meter.start(self.step)

    def _set_rates(self, factor: float) -> None:
        """Set the learning rates to this part of their peaks."""
        for group, peak in zip(self._optimizer.param_groups, self._peak_lrs, strict=True):
            group["lr"] = peak * factor

    def _after_step(self) -> None:
        """Report, evaluate and save what is due."""
        config = self.config
        last = self.step >= config.max_steps
        self._report()  # of the step before; the device has this one to do
        if last or self.step % config.log_every == 0 or self.step == 1:
            self._guard.send()
            self._meter.mark()
            self._unreported = self.step, float(self._optimizer.param_groups[0]["lr"])
        self._tell("on_step_end")
        saves = last or is_due(self.step, config.save_every)
        if self.eval_dataset is not None and (last or is_due(self.step, config.eval_every)):
            self._catch_up()  # here already: after a bad number nothing is to be saved
            try:
                metrics = self.evaluate()
                self._saver.evaluated = self.step, metrics.loss
                self._tell("on_evaluate", metrics)
            except Exception:
                if saves and self.accelerator.num_processes == 1:  # others may not have failed, and would not save
                    self.save()
                raise
        if saves:
            self.save()

    def _report(self) -> None:
        """Tell of the step whose numbers were sent for, and of those held back so far; stop if they are too many."""
        if held_back := self._guard.check():
            self._tell("on_step_skipped", held_back)
        self._guard.enforce()
        if self._unreported is not None:
            (step, rate), self._unreported = self._unreported, None
            loss, grad_norm = self._guard.latest
            metrics = self._meter.measure(step, loss=loss, grad_norm=grad_norm, learning_rate=rate)
            self._tell("on_log", metrics)

    def _catch_up(self) -> None:
        """Wait for the device, and tell of all it has done."""
        self._report()
        self._guard.send()
        self._report()

    def _answer(self, signals: SignalHandler, agreement: FlagExchange) -> None:
        """Do what a signal to any process asks, on all of them at the same step."""
        flags = [*signals.take(), float(self.should_stop), float(self._saver.failed)]
        *asked, stop, writer_failed = agreement.exchange(flags)
        self._stopping = self._stopping or stop
        self.should_stop = self.should_stop or self._stopping  # for who asks afterwards, on every process
        if writer_failed:
            self._saver.wait()  # raises it, on every process
        for number in (number for number, flag in zip(HANDLED_SIGNALS, asked, strict=True) if flag):
            self.save()
            if ends(number):
                self._saver.wait()
                leave(number)

    def evaluate(self, dataset: Dataset[Any] | None = None) -> EvalMetrics:
        """The mean loss over a dataset, every target counted once however many processes share the work.

        Args:
            dataset: `eval_dataset` if not given.

        Raises:
            ConfigError: there is no dataset.
            DataError: the model cannot read it.
        """
        if dataset is not None:
            check_dataset(dataset, "dataset", **self._limits)
        dataset = self.eval_dataset if dataset is None else dataset
        if dataset is None:
            raise ConfigError("There is nothing to evaluate on: give Trainer an eval_dataset, or evaluate() a dataset.")
        if self._running:
            self._catch_up()  # waits for the steps, whose time would be taken for the evaluation's
        with self._meter.paused():
            loss, num_tokens = mean_loss(
                self.accelerator,
                self._wrapped,
                dataset,
                micro_batch_size=self.batch.micro_batch_size,
                vocab_size=self.model.config.vocab_size,
                max_batches=self.config.eval_batches,
                eagerly=self._evaluates_eagerly,
            )
        bytes_per_token = getattr(dataset, "bytes_per_token", None)
        return EvalMetrics.of(step=self.step, loss=loss, num_tokens=num_tokens, bytes_per_token=bytes_per_token)

    def save(self) -> Path:
        """Save a checkpoint of this step; every process calls this, the first one writes, in the background.

        Returns:
            The folder it will be in.

        Raises:
            CheckpointError: an earlier checkpoint could not be written.
            NonFiniteError: a bad step is not to be saved.
        """
        path = self._saver.path(self.step)
        self._catch_up()  # first: a callback it tells may save
        if not self._saver.is_saved(self.step):
            with self._meter.paused():
                self._saver.save(self.step)
            self._tell("on_save", path)
        if not self._running:
            self._saver.finish()
        return path

    def full_model(self) -> GPT:
        """The model with its whole weights: itself, or under FSDP a plain copy; every process calls this."""
        return self.model if self._empty_copy is None else gather_full_model(self._empty_copy, self._wrapped)

    def sample(self, text: str = "", max_new_tokens: int = 100, **sampling: Any) -> str:  # noqa: ANN401
        """Text the model writes after `text`, which is included.

        Args:
            text: what to go on from; if empty, the tokenizer's end-of-text mark, a line's end or a first character.
            max_new_tokens: tokens to write.
            sampling: `GPT.generate`'s arguments: temperature, top_k, seed and so on.

        Raises:
            ConfigError: the training dataset has no tokenizer.
        """
        if self._tokenizer is None:
            raise ConfigError("sample() needs a tokenizer of ours; train_dataset has none. Use model.generate on ids.")
        end = self._tokenizer.end_of_text_id
        ids = list(self._tokenizer.encode(text or default_prompt(self._tokenizer))) if text or end is None else [end]
        written = self.full_model().generate([ids], max_new_tokens, **sampling)[0]
        return str(self._tokenizer.decode(written if text else written[1:]))

    @property
    def is_main_process(self) -> bool:
        """Whether this is the process that writes and prints."""
        return bool(self.accelerator.is_main_process)

    def _tell(self, event: str, *facts: object) -> None:
        """Call every callback's method of that name."""
        beside_a_step = event in ("on_step_end", "on_log", "on_step_skipped")  # the device has one to do meanwhile
        with nullcontext() if beside_a_step else self._meter.paused():
            for callback in self.callbacks:
                getattr(callback, event)(self, *facts)
