"""What is told of a run's events: the base, the progress display, early stopping."""

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from homebrew.errors import ConfigError
from homebrew.metrics.step_metrics import EvalMetrics, SkippedStep, StepMetrics, past_eval_losses

if TYPE_CHECKING:
    from homebrew.training.trainer import Trainer


class Callback:
    """Does nothing at each of a run's events; a subclass does something at some. All processes call it."""

    def on_train_begin(self, trainer: "Trainer") -> None:
        """Weights, optimizer and step are where training starts or goes on."""

    def on_step_end(self, trainer: "Trainer") -> None:
        """A step was taken, or on a GPU is on its way; nothing has waited for it."""

    def on_log(self, trainer: "Trainer", metrics: StepMetrics) -> None:
        """The figures of every `TrainerConfig.log_every`-th step, `metrics.step`; `trainer.step` may be one further."""

    def on_evaluate(self, trainer: "Trainer", metrics: EvalMetrics) -> None:
        """The evaluation dataset was gone through."""

    def on_save(self, trainer: "Trainer", path: Path) -> None:
        """A checkpoint was handed to the writer; it is whole when the folder `path` exists."""

    def on_step_skipped(self, trainer: "Trainer", steps: Sequence[SkippedStep]) -> None:
        """Some steps' updates were not applied; told at the next report, evaluation or save, before an error of it."""

    def on_train_end(self, trainer: "Trainer") -> None:
        """Training ended, also by an error, even by one of an `on_train_begin`, which not all may have heard."""


class EarlyStopping(Callback):
    """Ends the run when the evaluation loss no longer falls.

    A resumed run counts on from the evaluations that `metrics.jsonl` in its `output_dir` has of it. One that was ended
    here, and is resumed, goes on to its next evaluation.

    Args:
        patience: evaluations without a new best before the run ends.
        min_delta: nats by which a loss must be lower than the best to be a new best.

    Raises:
        ConfigError: a number is out of range.
    """

    def __init__(self, patience: int, min_delta: float = 0.0) -> None:
        if patience < 1 or min_delta < 0:
            raise ConfigError(f"patience={patience} must be at least 1, min_delta={min_delta} at least 0.")
        self.patience = patience
        self.min_delta = min_delta
        self._best = float("inf")
        self._without = 0

    def on_train_begin(self, trainer: "Trainer") -> None:
        """Begin anew, or where the run had come to."""
        self._best, self._without = float("inf"), 0
        if trainer.is_main_process:
            for loss in past_eval_losses(Path(trainer.config.output_dir) / "metrics.jsonl", trainer.step):
                self._count(loss)

    def on_evaluate(self, trainer: "Trainer", metrics: EvalMetrics) -> None:
        """Count evaluations without a new best; the first process decides, for only it has the run's file."""
        if trainer.is_main_process:
            self._count(metrics.loss)
            trainer.should_stop = trainer.should_stop or self._without >= self.patience

    def _count(self, loss: float) -> None:
        if loss < self._best - self.min_delta:
            self._best, self._without = loss, 0
        else:
            self._without += 1


class ProgressDisplay(Callback):
    """Shows how a run goes: a table kept up to date on a terminal, plain lines elsewhere.

    Args:
        console: where to; standard output if None.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console
        self._live: Live | None = None
        self._evaluation: EvalMetrics | None = None

    def on_train_begin(self, trainer: "Trainer") -> None:
        """Say where the run starts."""
        if not trainer.is_main_process:
            return
        self._console = self._console or _Console(file=sys.stdout, soft_wrap=True)
        model, batch = trainer.model, trainer.batch
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        part = f" ({trained:,} trained)" if any(not p.requires_grad for p in model.parameters()) else ""
        self._say(
            f"{model.num_parameters():,} parameters{part} on {trainer.accelerator.device} × "
            f"{trainer.accelerator.num_processes}, precision {trainer.accelerator.mixed_precision}; "
            f"{batch.global_batch_size} sequences of {trainer.sequence_length} tokens a step in "
            f"{batch.accumulation_steps} micro-batches of {batch.micro_batch_size}; "
            f"step {trainer.step} of {trainer.config.max_steps}"
        )
        if self._console.is_terminal:
            self._live = Live(console=self._console, refresh_per_second=8)
            self._live.start()

    def on_log(self, trainer: "Trainer", metrics: StepMetrics) -> None:
        """Show a step's figures."""
        if self._console is None:
            return
        if self._live is not None:
            self._live.update(_table(figures(metrics, trainer.config.max_steps), self._evaluation))
        else:
            self._say(" | ".join(f"{name} {value}" for name, value in figures(metrics, trainer.config.max_steps)))

    def on_evaluate(self, trainer: "Trainer", metrics: EvalMetrics) -> None:
        """Show an evaluation."""
        self._evaluation = metrics
        bits = "" if metrics.bits_per_byte is None else f" | bits per byte {metrics.bits_per_byte:.4f}"
        self._say(
            f"step {metrics.step} | validation loss {metrics.loss:.4f} | perplexity {metrics.perplexity:,.2f}{bits}"
        )

    def on_save(self, trainer: "Trainer", path: Path) -> None:
        """Show a checkpoint."""
        self._say(f"step {trainer.step} | saving {path}")

    def on_step_skipped(self, trainer: "Trainer", steps: Sequence[SkippedStep]) -> None:
        """Show what was left out."""
        for held in steps:
            self._say(f"step {held.step} | left out: {held.reason} | loss {held.loss:.4f} | norm {held.grad_norm:.3f}")

    def on_train_end(self, trainer: "Trainer") -> None:
        """Leave the terminal as it was, the last table standing; say so if the run is not over."""
        if self._live is not None:
            with contextlib.suppress(OSError):
                self._live.stop()
            self._live = None
        if trainer.step < trainer.config.max_steps:
            self._say(f"step {trainer.step} of {trainer.config.max_steps} | ended; resume goes on from the last save")

    def _say(self, line: str) -> None:
        if self._console is not None:
            with contextlib.suppress(OSError):  # a terminal may be gone: the run is not over for that
                self._console.print(Text(line))


class _Console(Console):
    """A console whose reader may have had enough, as `head` has; rich would end the program."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        with contextlib.suppress(OSError), Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), self.file.fileno())  # for what others print, and what is left to be written


def figures(metrics: StepMetrics, max_steps: int) -> list[tuple[str, str]]:
    """A step's figures by name, as people read them."""
    steps_left = max_steps - metrics.step
    tokens_per_step = metrics.num_tokens / metrics.step
    seconds_left = steps_left * tokens_per_step / max(metrics.tokens_per_second, 1e-9)
    memory = "n/a" if metrics.memory_bytes is None else f"{metrics.memory_bytes / 2**30:.1f} GiB"
    return [
        ("step", f"{metrics.step}/{max_steps}"),
        ("loss", f"{metrics.loss:.4f}"),
        ("lr", f"{metrics.learning_rate:.2e}"),
        ("norm", f"{metrics.grad_norm:.3f}"),
        ("tokens/s", f"{metrics.tokens_per_second:,.0f}"),
        ("MFU", "n/a" if metrics.mfu is None else f"{metrics.mfu:.1%}"),
        ("memory", memory),
        ("left", _clock(seconds_left)),
    ]


def _table(row: list[tuple[str, str]], evaluation: EvalMetrics | None) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", expand=False)
    cells = row if evaluation is None else [*row, ("val loss", f"{evaluation.loss:.4f}")]
    for name, _ in cells:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row(*(value for _, value in cells))
    return table


def _clock(seconds: float) -> str:
    minutes, whole = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{whole:02}"
