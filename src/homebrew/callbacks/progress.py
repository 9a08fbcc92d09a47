"""`ProgressDisplay`: shows training progress on the terminal."""

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

from homebrew.callbacks.base import Callback
from homebrew.distributed.precision import describe_precision
from homebrew.metrics.step_metrics import EvalMetrics, SkippedStep, StepMetrics

if TYPE_CHECKING:
    from homebrew.training.trainer import Trainer


class ProgressDisplay(Callback):
    """Shows training progress: a live table on a terminal, plain lines otherwise. Only rank 0 prints.

    Args:
        console: Console to print to. Default: standard output.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console
        self._live: Live | None = None
        self._last_evaluation: EvalMetrics | None = None

    def on_train_begin(self, trainer: "Trainer") -> None:
        """Print a summary of the run and start the live table."""
        if not trainer.is_main_process:
            return
        self._console = self._console or _PipeSafeConsole(file=sys.stdout, soft_wrap=True)
        self._print(_summary(trainer))
        if self._console.is_terminal:
            self._live = Live(console=self._console, refresh_per_second=8)
            self._live.start()

    def on_log(self, trainer: "Trainer", metrics: StepMetrics) -> None:
        """Show the metrics of a step."""
        if self._console is None:
            return
        cells = format_metrics(metrics, trainer.config.max_steps)
        if self._live is not None:
            self._live.update(_table(cells, self._last_evaluation))
        else:
            self._print(" | ".join(f"{name} {value}" for name, value in cells))

    def on_evaluate(self, trainer: "Trainer", metrics: EvalMetrics) -> None:
        """Print the metrics of an evaluation."""
        self._last_evaluation = metrics
        bits = "" if metrics.bits_per_byte is None else f" | bits per byte {metrics.bits_per_byte:.4f}"
        self._print(
            f"step {metrics.step} | validation loss {metrics.loss:.4f} | perplexity {metrics.perplexity:,.2f}{bits}"
        )

    def on_save(self, trainer: "Trainer", path: Path) -> None:
        """Print the path of a checkpoint."""
        self._print(f"step {trainer.step} | saving {path}")

    def on_step_skipped(self, trainer: "Trainer", steps: Sequence[SkippedStep]) -> None:
        """Print the skipped steps."""
        for skipped in steps:
            self._print(
                f"step {skipped.step} | skipped: {skipped.reason} | loss {skipped.loss:.4f} | "
                f"norm {skipped.grad_norm:.3f}"
            )

    def on_train_end(self, trainer: "Trainer") -> None:
        """Stop the live table and restore the cursor."""
        if self._live is not None:
            with contextlib.suppress(OSError):
                self._live.stop()
            self._live = None
        if trainer.step < trainer.config.max_steps:
            self._print(
                f"step {trainer.step}/{trainer.config.max_steps} | stopped early; resume to continue from the last "
                f"checkpoint"
            )

    def _print(self, line: str) -> None:
        if self._console is not None:
            with contextlib.suppress(OSError):  # a closed terminal must not end the run
                self._console.print(Text(line))


class _PipeSafeConsole(Console):
    """A console that goes silent when its pipe is closed, as by `| head`. Rich would exit the process."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        with contextlib.suppress(OSError), Path(os.devnull).open("wb") as devnull:
            os.dup2(devnull.fileno(), self.file.fileno())  # for other prints and for what is still buffered


def format_metrics(metrics: StepMetrics, max_steps: int) -> list[tuple[str, str]]:
    """Format the metrics of a step as pairs of label and value, in display order."""
    tokens_per_step = metrics.num_tokens / metrics.step
    remaining_tokens = (max_steps - metrics.step) * tokens_per_step
    remaining_seconds = remaining_tokens / max(metrics.tokens_per_second, 1e-9)
    return [
        ("step", f"{metrics.step}/{max_steps}"),
        ("loss", f"{metrics.loss:.4f}"),
        ("lr", f"{metrics.learning_rate:.2e}"),
        ("norm", f"{metrics.grad_norm:.3f}"),
        ("tokens/s", f"{metrics.tokens_per_second:,.0f}"),
        ("MFU", "n/a" if metrics.mfu is None else f"{metrics.mfu:.1%}"),
        ("memory", "n/a" if metrics.memory_bytes is None else f"{metrics.memory_bytes / 2**30:.1f} GiB"),
        ("ETA", _format_duration(remaining_seconds)),
    ]


def _summary(trainer: "Trainer") -> str:
    model, batch, accelerator = trainer.model, trainer.batch, trainer.accelerator
    num_trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    has_frozen = any(not parameter.requires_grad for parameter in model.parameters())
    trainable = f" ({num_trainable:,} trainable)" if has_frozen else ""
    return (
        f"{model.num_parameters():,} parameters{trainable} | {accelerator.device} × {accelerator.num_processes} | "
        f"{describe_precision(accelerator, trainer.config.mixed_precision)} | "
        f"batch {batch.global_batch_size} × {trainer.sequence_length} tokens "
        f"(micro-batch {batch.micro_batch_size}, accumulation {batch.accumulation_steps}) | "
        f"step {trainer.step}/{trainer.config.max_steps}"
    )


def _table(cells: list[tuple[str, str]], last_evaluation: EvalMetrics | None) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", expand=False)
    if last_evaluation is not None:
        cells = [*cells, ("val loss", f"{last_evaluation.loss:.4f}")]
    for name, _ in cells:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row(*(value for _, value in cells))
    return table


def _format_duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
