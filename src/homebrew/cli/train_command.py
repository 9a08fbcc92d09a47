"""`homebrew train`: train a new model, or fine-tune a pretrained one."""

import shlex
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import OmitArgPrefixes, UseAppendAction

from homebrew.callbacks.background_stream import BackgroundStream
from homebrew.cli.open_datasets import (
    are_token_files,
    data_files,
    is_same_tokenizer,
    open_dataset,
    open_eval_dataset,
    token_files_tokenizer,
)
from homebrew.cli.open_model import resolve_tokenizer, sample_command
from homebrew.cli.train_options import DataOptions, ModelOptions, SampleOptions, TrainerOptions
from homebrew.constants import Aspect
from homebrew.errors import ConfigError, DataError
from homebrew.io import local_path_or_name

if TYPE_CHECKING:
    from homebrew.data.dataset import TokenDataset
    from homebrew.data.tokenizer import Tokenizer
    from homebrew.model.gpt import GPT
    from homebrew.training.trainer_config import TrainerConfig


@dataclass(kw_only=True)
class Train:
    """Train a GPT on text files or on token files.

    Ctrl-C saves a checkpoint and exits, a second Ctrl-C exits without saving. --resume continues the run.

    On multiple GPUs:
      accelerate launch --multi_gpu -m homebrew train ...
    """

    data: OmitArgPrefixes[DataOptions]
    model: OmitArgPrefixes[ModelOptions]
    trainer: OmitArgPrefixes[TrainerOptions]
    samples: OmitArgPrefixes[SampleOptions]
    resume: bool = False
    """Resume from the newest valid checkpoint in --output-dir, or start from step 0 if there is none. Options that are
    not given are taken from the run."""
    overwrite: bool = False
    """Start a new run in an --output-dir that already holds one; the earlier run is moved to its subfolder old-1."""
    accept_changes: UseAppendAction[tuple[Aspect, ...]] = ()
    """With --resume, a property that may differ from the checkpoint's run."""

    def run(self) -> None:
        """Run the command."""
        from homebrew import GPT, RunLogger, Trainer
        from homebrew.cli.saved_command import command_line
        from homebrew.data.text_paths import describe_files
        from homebrew.model.lora import add_lora

        config, lora = self.trainer.validated(), self.model.lora_config()
        self._check_options(config)
        sampling = self.samples.callbacks()
        files = data_files(self.data.files)
        pretrained, tokenizer = self._load_pretrained()
        choice = self._learning_rate_advice(config) if pretrained else self._choose_defaults(files)
        train_dataset, eval_dataset = self._open_datasets(files, pretrained, tokenizer)
        model = pretrained or GPT(
            self.model.new_config(vocab_size=train_dataset.vocab_size), seed=config.seed, init=self.model.init
        )
        if lora is not None:
            add_lora(model, lora, seed=config.seed)
        logger = RunLogger(command=command_line(self))
        trainer = Trainer(model, train_dataset, eval_dataset=eval_dataset, config=config, callbacks=[logger, *sampling])
        if trainer.is_main_process:
            if files != list(self.data.files):  # DATA has a folder or a pattern
                _print(f"Data: {describe_files(files)}.")
            if choice is not None:
                _print(choice)
        try:
            trainer.train(resume=self.resume, accept_changes=self.accept_changes, overwrite=self.overwrite)
        except (SystemExit, KeyboardInterrupt):
            if trainer.is_main_process:
                resume = shlex.join(["homebrew", "train", "--resume", "--output-dir", str(self.trainer.output_dir)])
                _print(f"To resume: {resume}")
            raise
        if trainer.is_main_process:
            output_dir = self.trainer.output_dir
            sample = sample_command(output_dir, train_dataset.tokenizer)
            _print(f"The model is saved in {output_dir}. Try it: {sample}")

    def _check_options(self, config: "TrainerConfig") -> None:
        """Check combinations of options before anything is loaded."""
        from homebrew.checkpoint.store import CheckpointStore

        if self.resume and self.overwrite:
            raise ConfigError("--resume continues a run, and --overwrite starts a new one. Remove one of them.")
        if not (self.resume or self.overwrite):
            CheckpointStore(config.output_dir).check_is_empty()
        if self.accept_changes and not self.resume:
            raise ConfigError("--accept-changes applies to resuming a run. Add --resume, or remove --accept-changes.")
        self.data.check()
        has_eval_data = self.data.eval_data or self.data.eval_fraction
        if not has_eval_data and (config.eval_every is not None or config.eval_batches is not None):
            raise ConfigError(
                "There is no data for --eval-every and --eval-batches. Add --eval-data, or an --eval-fraction above 0."
            )
        self.model.check()

    def _load_pretrained(self) -> tuple["GPT | None", "Tokenizer | None"]:
        """Load the model and tokenizer of --init-from; (None, None) for a new model."""
        from homebrew.hub.load import load_model

        if self.model.init_from is None:
            return None, None
        # The command line is recorded, and the run may be resumed from another folder.
        self.model.init_from = str(local_path_or_name(self.model.init_from))
        model, tokenizer = load_model(self.model.init_from)
        if self.model.dropout is not None:
            model.set_dropout(self.model.dropout)
        return model, tokenizer

    def _learning_rate_advice(self, config: "TrainerConfig") -> str | None:
        """Return advice if pretrained weights would be trained with the default learning rate of a new model."""
        if self.resume or self.trainer.learning_rate is not None:
            return None
        rate = "5e-5" if self.model.lora_rank is None else "1e-3"
        return (
            f"Learning rate: {config.effective('learning_rate'):g}, the default for a new model. For the pretrained "
            f"weights of --init-from, try --learning-rate {rate}."
        )

    def _choose_defaults(self, files: Sequence[Path]) -> str | None:
        """Replace the "auto" of a new model's preset and tokenizer.

        Returns:
            What was chosen and how to choose something else, or None if the preset was given.
        """
        from homebrew.distributed.precision import uses_cpu

        data, model = self.data, self.model
        on_cpu, was_auto = uses_cpu(), model.preset == "auto"
        model.choose_preset(token_files_tokenizer(files) or data.tokenizer, on_cpu=on_cpu)
        if data.tokenizer == "auto" and not are_token_files(files):
            data.tokenizer = "char" if model.preset == "char" else "gpt2"
        if not was_auto:
            return None
        tokenizer = "" if data.tokenizer == "auto" else f" --tokenizer {data.tokenizer}"
        if not on_cpu:
            return f"Model: --preset {model.preset}{tokenizer}, the default on a GPU."
        rate = " It learns faster with a higher --learning-rate, such as 3e-3."
        return (
            f"Model: --preset {model.preset}{tokenizer}, the default on a CPU, where --preset gpt2 would take hours."
            f"{rate if self.trainer.learning_rate is None else ''}"
        )

    def _open_datasets(
        self, files: Sequence[Path], pretrained: "GPT | None", model_tokenizer: "Tokenizer | None"
    ) -> tuple["TokenDataset", "TokenDataset | None"]:
        """Open the training dataset, and the evaluation dataset or a split for it."""
        data, init_from = self.data, self.model.init_from
        limit = (pretrained.config if pretrained else self.model.new_config()).block_size
        block_size = limit if self.model.block_size is None else self.model.block_size
        if not 1 <= block_size <= limit:
            raise ConfigError(f"--block-size {block_size}: must be from 1 to {limit}, the block size of {init_from}.")
        tokenizer: Tokenizer | str | Path | None = None if data.tokenizer == "auto" else data.tokenizer
        if init_from is not None and not are_token_files(files):
            tokenizer = resolve_tokenizer(init_from, model_tokenizer, data.tokenizer)
        train_dataset = open_dataset(files, block_size, tokenizer)
        self._check_tokenizer(train_dataset, model_tokenizer)
        if data.eval_data:
            return train_dataset, open_eval_dataset(data_files(data.eval_data), train_dataset)
        if not data.eval_fraction:
            return train_dataset, None
        try:
            return train_dataset.split(1 - data.eval_fraction, seed=self.trainer.seed)
        except DataError as error:
            raise DataError(
                f"--eval-fraction {data.eval_fraction:g} of {len(train_dataset)} windows leaves one of the two "
                f"datasets empty. Give more text, a smaller --block-size, or --eval-fraction 0 to train on all of it."
            ) from error

    def _check_tokenizer(self, dataset: "TokenDataset", model_tokenizer: "Tokenizer | None") -> None:
        """Check that the data has the tokenizer of --init-from."""
        if model_tokenizer is None or dataset.tokenizer is None:
            return  # one of them is unknown
        if not is_same_tokenizer(model_tokenizer, dataset.tokenizer):
            names = ", ".join(map(str, self.data.files))
            raise DataError(
                f"{names} has the tokenizer {dataset.tokenizer.name!r}, but {self.model.init_from} has another, the "
                f"tokenizer {model_tokenizer.name!r}. Prepare the text with the model's tokenizer, or train a new "
                f"model."
            )


def _print(text: str) -> None:
    """Print in the background, as the progress display does: an unread or closed standard output stops nothing."""
    with closing(BackgroundStream(sys.stdout)) as stream:
        print(text, file=stream)
