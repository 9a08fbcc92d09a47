"""`SampleText`: generates text while training."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from homebrew.callbacks.base import Callback
from homebrew.callbacks.events import emit
from homebrew.data.tokenizer import dataset_tokenizer
from homebrew.distributed.collectives import run_on_main
from homebrew.errors import ConfigError, DataError
from homebrew.generation.sampling import Sampling
from homebrew.integers import SEED_RANGE, as_integer
from homebrew.io import write_errors
from homebrew.metrics.metrics_log import MetricsLog
from homebrew.metrics.step_metrics import TextSample

if TYPE_CHECKING:
    from homebrew.training.trainer import Trainer

_MAX_PROMPT, _MAX_TEXT = 1000, 4000
"""Numbers of characters kept in `samples.jsonl`, whose lines have a maximum length."""


class SampleText(Callback):
    """Generates text every few steps and at the end of the run, to see what the model has learned.

    The samples are shown by the progress display, appended to `samples.jsonl` in `output_dir`, and sent to the trackers
    that take text. They are generated with the weights that are evaluated and saved. Sampling does not change the
    training: the global random state is not used.

    With several processes, each generates the same text. Under FSDP, each gathers the full weights for every prompt.

    Args:
        every: Number of steps between samples.
        prompts: Texts to continue. An empty text lets the model begin.
        max_new_tokens: Number of tokens to generate for each prompt.
        sampling: How to choose tokens. Default: sample from the model's distribution unchanged.
        seed: Random seed of the first prompt; each further prompt adds 1. The seeds are the same at every step, so that
            samples differ only by what the model has learned.

    Raises:
        ConfigError: An argument is not valid. A Trainer with this callback has a training dataset without a tokenizer,
            a prompt that its tokenizer cannot encode, or a model that does not generate.
    """

    def __init__(
        self,
        *,
        every: int,
        prompts: Sequence[str] = ("",),
        max_new_tokens: int = 100,
        sampling: Sampling | None = None,
        seed: int = 0,
    ) -> None:
        self.every = as_integer("every", every, 1)
        prompts = (prompts,) if isinstance(prompts, str) else prompts
        self.prompts = tuple(prompts) if isinstance(prompts, Iterable) else ()
        if not (self.prompts and all(isinstance(prompt, str) for prompt in self.prompts)):
            raise ConfigError(f"prompts={prompts!r:.200} is not valid. Use a list of one or more strings.")
        self.max_new_tokens = as_integer("max_new_tokens", max_new_tokens, 1)
        if not isinstance(sampling, Sampling | None):
            raise ConfigError(f"sampling={sampling!r:.200} is not valid. Use a Sampling, or None.")
        self.sampling = sampling
        self.seed = as_integer("seed", seed, *SEED_RANGE)
        self._log: MetricsLog | None = None

    def on_init_end(self, trainer: "Trainer") -> None:
        """Check that the trainer can sample."""
        tokenizer = dataset_tokenizer(trainer.train_dataset)
        if tokenizer is None:
            raise ConfigError(
                "Samples need a Tokenizer, but train_dataset has none. Give it one, or remove SampleText "
                "(--sample-every)."
            )
        if not callable(getattr(trainer.model, "generate", None)):
            raise ConfigError(
                f"Samples need a model with a generate method, which {type(trainer.model).__name__} does not have. Add "
                f"the method, or remove SampleText (--sample-every)."
            )
        for prompt in self.prompts:
            try:
                tokenizer.encode(prompt)
            except DataError as error:
                raise ConfigError(f"The samples' prompt {prompt!r:.200} cannot be used: {error}") from error

    def on_train_begin(self, trainer: "Trainer") -> None:
        """Try to sample, so that errors come before the first step, and open `samples.jsonl`.

        Raises:
            ConfigError: Rank 0 cannot write to `output_dir`. Raised on all ranks.
            ModelError: The model failed to generate.
        """
        self._generate(trainer)
        run_on_main(trainer.accelerator, partial(self._open, Path(trainer.config.output_dir) / "samples.jsonl"))
        if self._log is not None:
            self._log.write("resume" if trainer.step else "begin", step=trainer.step)

    def on_step_end(self, trainer: "Trainer") -> None:
        """Generate the samples of a step for which they are due."""
        if trainer.step % self.every and trainer.step < trainer.config.max_steps:
            return
        with trainer.paused():
            samples = self._generate(trainer)
            if self._log is not None:
                for sample in samples:
                    fields = asdict(sample)
                    fields |= {"prompt": sample.prompt[:_MAX_PROMPT], "text": sample.text[:_MAX_TEXT]}
                    self._log.write("sample", **fields)
            emit(trainer, "on_sample", samples)

    def on_train_end(self, trainer: "Trainer") -> None:
        """Close the file."""
        if self._log is not None:
            self._log.close()
            self._log = None

    def _generate(self, trainer: "Trainer") -> list[TextSample]:
        sample = partial(trainer.sample, max_new_tokens=self.max_new_tokens, sampling=self.sampling)
        texts = [sample(prompt, seed=self.seed + i) for i, prompt in enumerate(self.prompts)]
        return [TextSample(trainer.step, *pair) for pair in zip(self.prompts, texts, strict=True)]

    def _open(self, path: Path) -> None:
        with write_errors(path, ConfigError, "Check the permissions and the disk, or choose another output_dir."):
            self._log = MetricsLog(path)
