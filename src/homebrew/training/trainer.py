"""The Trainer: public methods and the training loop."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import Dataset

from homebrew.callbacks.base import Callback
from homebrew.callbacks.events import emit, emit_train_end
from homebrew.data.loader import Batch, explain_worker_errors
from homebrew.data.tokenizer import dataset_tokenizer
from homebrew.data.validation import check_dataset
from homebrew.distributed.collectives import run_on_main
from homebrew.distributed.fsdp import gather_full_model
from homebrew.distributed.signals import SignalHandler
from homebrew.errors import ConfigError, HomebrewError
from homebrew.evaluation.mean_loss import EvaluationStopped
from homebrew.generation.model_generate import continue_text
from homebrew.generation.sampling import Sampling
from homebrew.hub.save_model import save_model
from homebrew.io import absolute_path
from homebrew.metrics.metrics_log import past_eval_losses
from homebrew.metrics.step_metrics import EvalMetrics
from homebrew.model.gpt_config import GPTConfig
from homebrew.model.interfaces import interface_of
from homebrew.model.language_model import LanguageModel
from homebrew.training.arguments import check_arguments, check_start
from homebrew.training.device_errors import explain_device_asserts, explain_out_of_memory
from homebrew.training.global_settings import exclusive_training
from homebrew.training.learning_rates import LearningRates, warn_of_tiny_multipliers
from homebrew.training.parts import build_callbacks
from homebrew.training.run_requests import RunRequests
from homebrew.training.schedule import Schedule
from homebrew.training.setup import build_parts
from homebrew.training.trainer_config import TrainerConfig
from homebrew.training.unknown_arguments import explain_unknown_arguments
from homebrew.user_warnings import warn


class Trainer:
    """Trains a language model with Accelerate; the same script runs on a laptop, in a notebook, on one GPU or many.

    Args:
        model: Model to train, in place: a `GPT`, a causal language model of transformers, or any module that follows
            `LanguageModel`. Or the config of a new GPT, whose weights come from the run's seed.
        train_dataset: A `TokenDataset`, or any map-style dataset. Its samples may be pairs (input_ids, targets), token
            ids, or dictionaries with `input_ids`, of any integer dtype and of different lengths. See `DictDataset` for
            dictionaries with `labels`.
        eval_dataset: A dataset of the same kind to evaluate on.
        config: Training configuration.
        optimizer: Custom optimizer over the model's parameters; or several, each over some of the parameters. The
            config must then leave `optimizer`, `learning_rate`, `betas`, `muon_momentum` and `weight_decay` at their
            defaults.
        schedule: Function from the step to the multiplier of the learning rates that the optimizer has when `train()`
            is called. The config must then leave `lr_schedule`, `warmup_steps`, `decay_fraction` and `min_lr_ratio` at
            their defaults.
        accelerator: Custom Accelerator, whose precision and trackers are used instead of the launcher's settings.
        callbacks: Callbacks that receive training events, after the built-in ones. A `ProgressDisplay`,
            `RunLogger` or `CurvePlot` among them replaces the built-in one.
        progress: Whether to show the progress display.

    Raises:
        HomebrewError: A setting, the data or the launch is invalid. Nothing has been trained or written.
    """

    @explain_unknown_arguments
    def __init__(
        self,
        model: LanguageModel | GPTConfig,
        train_dataset: Dataset[Any],
        eval_dataset: Dataset[Any] | None = None,
        *,
        config: TrainerConfig,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
        schedule: Schedule | None = None,
        accelerator: Accelerator | None = None,
        callbacks: Sequence[Callback] = (),
        progress: bool = True,
    ) -> None:
        check_arguments(model, config, optimizer, schedule, accelerator, callbacks, progress=progress)
        self.config = config
        self.train_dataset = train_dataset
        self.eval_dataset = eval_dataset
        self.schedule = config.schedule() if schedule is None else schedule
        self.callbacks = build_callbacks(callbacks, progress=progress)
        parts = build_parts(
            model,
            train_dataset,
            eval_dataset,
            config=config,
            optimizer=optimizer,
            schedule=self.schedule,
            accelerator=accelerator,
        )
        self.accelerator = parts.accelerator
        self.model: Any = parts.model
        """The model that was given or built, without wrappers."""
        self.optimizer = parts.optimizer
        """The optimizer without Accelerate's wrapper; several are combined into one."""
        self.batch = parts.batch
        self.sequence_length = parts.sequence_length
        self.compile_mode = parts.compile_mode
        """How the model is compiled."""
        self.step = 0
        """Number of optimizer steps taken."""
        self.should_stop = False
        """A callback sets this, on any process, to end the run. With several processes, one more step is taken."""
        self._wrapped = parts.wrapped
        self._meta_copy = parts.meta_copy
        self._modes = parts.modes
        self._learning_rates = LearningRates(self.optimizer, self.schedule)
        if schedule is not None:
            warn_of_tiny_multipliers(self.optimizer, schedule, config.max_steps)
        self._guard = parts.guard
        self._train_step = parts.train_step
        self._mean_loss = parts.mean_loss
        self._warm_up_model = parts.warm_up_model
        self._loader = parts.loader
        self._logger = parts.logger
        self._checkpoints = parts.checkpoints
        self._needs_warm_up = self.compile_mode != "none"
        self._num_samples = 0  # position in the data; not a function of the step after a resume with accepted changes
        self._is_running = False
        self._should_stop_evaluation: Callable[[], bool] | None = None
        self._last_evaluation: tuple[int, float] | None = None  # step and loss
        self._emit("on_init_end")

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({interface_of(self.model).num_parameters():,} parameters, "
            f"step {self.step}/{self.config.max_steps}, {len(self.train_dataset):,} samples, "  # type: ignore[arg-type]
            f"output_dir={str(self.config.output_dir)!r})"
        )

    @explain_unknown_arguments
    @explain_device_asserts()
    def train(
        self, resume: bool | str | Path = False, *, accept_changes: Collection[str] = (), overwrite: bool = False
    ) -> None:
        """Train to `max_steps`, evaluating and saving as configured and at the end.

        Args:
            resume: True resumes from the newest valid checkpoint in `output_dir`, if there is one; a path resumes
                from that checkpoint.
            accept_changes: What may differ from the run that saved the checkpoint: "dataset", "model", "adapter",
                "optimizer", "schedule", "global_batch_size", "seed".
            overwrite: Whether to start a new run in an `output_dir` that already holds one. The earlier run is kept:
                its files are moved to `old-1`, `old-2`, … in `output_dir`.

        Raises:
            ConfigError: `output_dir` is not writable, is used by another run, or holds a run and neither `resume` nor
                `overwrite` is given, or `resume` names a checkpoint older than the newest. Or the checkpoint's step is
                above `max_steps`. Or this Trainer, or another thread of this process, is training already. Or the
                optimizer has state that a checkpoint cannot hold, which the first step shows.
            LaunchError: The ranks have different settings.
            CheckpointError: The checkpoint does not exist, is corrupt or belongs to another run.
            NonFiniteError: A loss or gradient was not finite, and `config.non_finite` does not allow it.
            ModelError: An id is outside the model's vocabulary, whose size was not known before.
        """
        check_start(resume, overwrite=overwrite)
        with (
            exclusive_training(self),
            SignalHandler(announce=self.is_main_process) as signals,
            self._checkpoints.locked(),
        ):
            self._start(resume, accept_changes, overwrite=overwrite)
            self._run(RunRequests(self.accelerator, signals, self._checkpoints))

    def _run(self, requests: RunRequests) -> None:
        """Train from the current step."""
        try:
            self._emit("on_train_begin")
            self._modes.train()
            self._is_running = True
            with (
                self._checkpoints,
                explain_out_of_memory(self.accelerator, self.batch),
                explain_worker_errors(self.config.loader_timeout_seconds),
                closing(self._loader.steps(self._num_samples)) as steps,
            ):
                if self._has_unfinished_evaluation():
                    self._evaluate_and_save_if_due(requests)
                    requests.handle(self)
                for micro_batches in steps:
                    if self.step >= self.config.max_steps or requests.stop_agreed:
                        break
                    self._warm_up(micro_batches[0])
                    learning_rate = self._learning_rates.set(self.step)
                    result = self._train_step(micro_batches)  # stays on the device
                    self.step += 1
                    self._num_samples += self.batch.global_batch_size
                    self._logger.submit(self.step, result, learning_rate, self._emit)
                    self._emit("on_step_end")
                    self._evaluate_and_save_if_due(requests)
                    requests.handle(self)
                self.save()
                self._checkpoints.wait()
                requests.handle_last(self)
        except BaseException as error:
            self._end(error)
            raise
        self._end(None)

    @explain_device_asserts()
    def evaluate(self, dataset: Dataset[Any] | None = None) -> EvalMetrics:
        """Compute the mean loss over a dataset, each target counted once on any number of processes.

        Args:
            dataset: Dataset to evaluate on. Default: `eval_dataset`.

        Raises:
            ConfigError: There is no dataset.
            DataError: The model cannot read the dataset.
        """
        if dataset is not None:
            model = interface_of(self.model)
            check_dataset(dataset, "dataset", block_size=model.block_size, vocab_size=model.vocab_size)
        dataset = self.eval_dataset if dataset is None else dataset
        if dataset is None:
            raise ConfigError("There is no evaluation dataset. Pass eval_dataset to Trainer, or dataset to evaluate().")
        with self.paused():
            loss, num_tokens = self._mean_loss(dataset, should_stop=self._should_stop_evaluation)
        bytes_per_token = getattr(dataset, "bytes_per_token", None)
        return EvalMetrics.from_loss(step=self.step, loss=loss, num_tokens=num_tokens, bytes_per_token=bytes_per_token)

    def save(self) -> Path:
        """Save a checkpoint of this step. Every process calls this; during training it is written asynchronously.

        Returns:
            The checkpoint's folder, which exists once the checkpoint is complete.

        Raises:
            ConfigError: Another run uses `output_dir`.
            CheckpointError: An earlier checkpoint could not be written.
            NonFiniteError: A step was not finite; nothing is saved.
            TrainingError: Parameters have been added, replaced or removed since the Trainer was built.
        """
        path = self._checkpoints.path(self.step)
        with self._checkpoints.locked():
            self._logger.flush(self._emit)  # first, because its callbacks may save too
            if not self._checkpoints.is_saved(self.step):
                evaluated_step, loss = self._last_evaluation or (None, None)
                eval_loss = loss if evaluated_step == self.step else None
                self._train_step.check_identities()
                with self._paused():
                    self._checkpoints.save(self.step, self._num_samples, eval_loss=eval_loss)
                self._emit("on_save", path)
            if not self._is_running:
                self._checkpoints.finish()
        return path

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Use the evaluation weights in this block, and do not count its time as training time.

        For callbacks that evaluate or sample in `on_step_end`, `on_log` or `on_step_skipped`. Every process calls this.
        The metrics of the steps taken so far are logged first.
        """
        if self._is_running:
            self._logger.flush(self._emit)  # finish the steps first, so that their time does not count as a pause
        with self._paused():
            yield

    def full_model(self) -> Any:  # noqa: ANN401 - of the type of `model`
        """Return the model with full (unsharded) weights. Every process calls this.

        Without FSDP this is the model itself; under FSDP it is a copy, in evaluation mode. With `ema_decay` or a
        schedule-free optimizer it has the training weights in `on_step_end`, `on_log` and `on_step_skipped`, elsewhere
        the evaluation weights.
        """
        return self.model if self._meta_copy is None else gather_full_model(self._meta_copy, self._wrapped)

    def sample(
        self, text: str = "", max_new_tokens: int = 100, *, sampling: Sampling | None = None, seed: int | None = None
    ) -> str:
        """Generate text that continues `text`. A model that is not a GPT generates with its own `generate` method.

        Args:
            text: Prompt, which the result includes. If empty: the tokenizer's end-of-text token, a newline, or the
                first character of its alphabet.
            max_new_tokens: Number of tokens to generate.
            sampling: How to choose tokens. Default: sample from the model's distribution unchanged.
            seed: Random seed for sampling. Default: each call differs.

        Raises:
            ConfigError: The training dataset has no tokenizer, or the model cannot generate with these options.
        """
        tokenizer = dataset_tokenizer(self.train_dataset)
        if tokenizer is None:
            raise ConfigError("sample() needs a Tokenizer, but train_dataset has none. Use model.generate on ids.")
        with self._modes.evaluating():
            return continue_text(self.full_model(), tokenizer, text, max_new_tokens, sampling=sampling, seed=seed)

    def save_pretrained(self, folder: str | Path) -> None:
        """Save the model, with the evaluation weights, to use it without the Trainer. Every process calls this.

        A GPT is saved in transformers' format, any other model by its own `save_pretrained` method. If a model has no
        such method, its state dict is saved as `model.safetensors`, which `safetensors.torch.load_model` loads. The
        tokenizer of the training dataset is saved for transformers' AutoTokenizer; a custom tokenizer is not saved,
        with a warning.

        Raises:
            ModelError: The folder cannot be written, or holds a checkpoint.
        """
        with self._modes.evaluating():
            model = self.full_model()
            save = partial(save_model, model, absolute_path(folder), dataset_tokenizer(self.train_dataset))
            run_on_main(self.accelerator, save)

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes files and prints."""
        return bool(self.accelerator.is_main_process)

    def _start(self, resume: bool | str | Path, accept_changes: Collection[str], *, overwrite: bool) -> None:
        """Restore the checkpoint, or start from step 0."""
        self._learning_rates.start()
        self._train_step.reset()  # clears gradients; PyTorch cannot load an optimizer's state while they exist
        self._guard.reset()
        self.step, self._num_samples = self._checkpoints.restore(resume, accept_changes, overwrite=overwrite)
        self.accelerator.step = 0  # Accelerate's count of micro-batches; an interrupted step leaves it in the middle
        self._wrapped.train()
        self.should_stop = False
        self._last_evaluation = None
        self._logger.start(self.step)

    def _end(self, error: BaseException | None) -> None:
        """End the run: successfully, or because of `error`."""
        self._is_running = False
        self._modes.eval()
        self._logger.cancel()
        self._learning_rates.restore()
        emit_train_end(self, error)

    @contextmanager
    def _paused(self) -> Iterator[None]:
        """Do not count the time of this block as training time, and use the weights to evaluate and save."""
        with self._logger.paused(), self._modes.evaluating():
            yield

    def _warm_up(self, micro_batch: Batch) -> None:
        """Compile before the first step, so that compiling does not count as a step's time."""
        if self._needs_warm_up:
            self._needs_warm_up = False
            self._train_step.check_parameters()
            with self._logger.paused():
                self._warm_up_model(micro_batch)

    def _is_due(self, every: int | None) -> bool:
        """Return whether this step is the last, or one of those that evaluate or save."""
        return self.step >= self.config.max_steps or (every is not None and self.step % every == 0)

    def _has_unfinished_evaluation(self) -> bool:
        """Return whether the run resumes from a step whose evaluation is not logged, as a stop signal broke it off."""
        if self.eval_dataset is None or self.step == 0 or not self._is_due(self.config.eval_every):
            return False
        if not self._checkpoints.is_saved(self.step):  # the checkpoint is one of another folder
            return False
        log = Path(self.config.output_dir) / "metrics.jsonl"
        return not run_on_main(self.accelerator, lambda: self.step in past_eval_losses(log, self.step))

    def _evaluate_and_save_if_due(self, requests: RunRequests) -> None:
        save_is_due = self._is_due(self.config.save_every)
        if self.eval_dataset is not None and self._is_due(self.config.eval_every):
            self._logger.flush(self._emit)  # may raise NonFiniteError, which must not lead to a save below
            try:
                metrics = self._evaluate_unless_stopped(requests)
                self._last_evaluation = self.step, metrics.loss
                self._emit("on_evaluate", metrics)
            except EvaluationStopped:
                return  # the request saves and ends the run
            except Exception:
                # Only with one process: the save is collective, and other processes may not have failed.
                if save_is_due and self.accelerator.num_processes == 1:
                    try:
                        self.save()
                    except HomebrewError as error:
                        warn(f"This step could not be saved either: {error}")
                raise
        if save_is_due:
            self.save()

    def _evaluate_unless_stopped(self, requests: RunRequests) -> EvalMetrics:
        """Evaluate; a stop signal raises EvaluationStopped here, but not in evaluations of callbacks."""
        self._should_stop_evaluation = requests.has_stop_signal
        try:
            return self.evaluate()
        finally:
            self._should_stop_evaluation = None

    def _emit(self, event: str, *arguments: object) -> None:
        """Call a method of every callback; training is paused, except in the events that happen while the GPU works."""
        overlaps = event in ("on_step_end", "on_log", "on_step_skipped")
        with nullcontext() if overlaps else self._paused():
            emit(self, event, *arguments)
