"""`EarlyStopping`: stops a run when the evaluation loss no longer improves."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from homebrew.callbacks.base import Callback
from homebrew.errors import ConfigError
from homebrew.integers import as_integer
from homebrew.metrics.metrics_log import past_eval_losses
from homebrew.metrics.step_metrics import EvalMetrics

if TYPE_CHECKING:
    from homebrew.training.trainer import Trainer


class EarlyStopping(Callback):
    """Stops the run when the evaluation loss no longer improves.

    A resumed run continues counting from its past evaluations, which are read from `metrics.jsonl` in `output_dir`.
    If a run stopped early is resumed, it trains until its next evaluation. A run of at most `patience` + 1 evaluations,
    such as a short trial, is never stopped.

    Args:
        patience: Number of consecutive evaluations without improvement after which the run stops.
        min_delta: Minimum decrease of the best loss, in nats per token, that counts as an improvement.

    Raises:
        ConfigError: `patience` is not an integer of at least 1, or `min_delta` not a finite number of at least 0. A
            Trainer with this callback has no `eval_dataset`, or evaluates only at the end.
    """

    def __init__(self, patience: int, min_delta: float = 0.0) -> None:
        self.patience = as_integer("patience", patience)
        if not isinstance(min_delta, int | float) or not 0 <= min_delta <= sys.float_info.max:
            raise ConfigError(f"min_delta={min_delta!r}: must be a finite number of at least 0, in nats per token.")
        self.min_delta = min_delta
        self._best_loss = float("inf")
        self._num_without_improvement = 0

    def on_init_end(self, trainer: "Trainer") -> None:
        """Check that the trainer evaluates."""
        if trainer.eval_dataset is None or trainer.config.eval_every is None:
            raise ConfigError(
                "EarlyStopping can never stop this run, because it has no evaluations before its end. Pass "
                "eval_dataset to Trainer and set eval_every in its config, or remove EarlyStopping."
            )

    def on_train_begin(self, trainer: "Trainer") -> None:
        """Reset, and count the run's past evaluations."""
        self._best_loss, self._num_without_improvement = float("inf"), 0
        if trainer.is_main_process:
            for loss in past_eval_losses(Path(trainer.config.output_dir) / "metrics.jsonl", trainer.step).values():
                self._update(loss)

    def on_evaluate(self, trainer: "Trainer", metrics: EvalMetrics) -> None:
        """Stop the run after `patience` evaluations without improvement."""
        if trainer.is_main_process:  # only rank 0 has metrics.jsonl; the trainer stops all ranks together
            self._update(metrics.loss)
            trainer.should_stop = trainer.should_stop or self._num_without_improvement >= self.patience

    def _update(self, loss: float) -> None:
        if loss < self._best_loss - self.min_delta:
            self._best_loss, self._num_without_improvement = loss, 0
        else:
            self._num_without_improvement += 1
