"""`ProgressDisplay`: shows training progress on the terminal or in a notebook."""

import contextlib
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

from rich.console import Console
from rich.live import Live
from rich.text import Text

from homebrew.callbacks.background_stream import BackgroundStream
from homebrew.callbacks.base import Callback
from homebrew.callbacks.notebook_display import NotebookDisplay
from homebrew.distributed.precision import describe_precision
from homebrew.metrics.step_metrics import EvalMetrics, SkippedStep, StepMetrics, TextSample
from homebrew.model.interfaces import interface_of
from homebrew.optim.combined import class_names
from homebrew.plotting.run_labels import printable

if TYPE_CHECKING:
    from homebrew.training.trainer import Trainer

_REFRESH_SECONDS = 0.1
_COLUMN_WIDTHS = {"loss": 7, "lr": 8, "norm": 6, "tokens/s": 9, "MFU": 5, "memory": 8, "ETA": 7}


class ProgressDisplay(Callback):
    """Shows training progress: a table on a terminal, one output with a curve in a notebook, a line per log elsewhere.

    Only rank 0 prints. Training does not wait for the output to be read.

    Args:
        console: Console to print to. Default: standard output.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._given_console = console
        self._view: _Lines | NotebookDisplay | None = None  # on rank 0, during a run
        self._saved: list[tuple[int, Path]] = []  # steps and checkpoints that exist or are being written
        self._has_logged = False

    def on_train_begin(self, trainer: "Trainer") -> None:
        """Print a summary of the run and start the table."""
        if not trainer.is_main_process:
            return
        self._console = self._given_console or Console(file=sys.stdout, soft_wrap=True)
        self._file = self._console.file
        self._stream = BackgroundStream(self._file)
        self._console.file = cast("IO[str]", self._stream)
        self._first_step, self._saved = trainer.step, []
        self._has_logged = False
        summary, max_steps = _summary(trainer), trainer.config.max_steps
        compiles = trainer.compile_mode in ("kernels", "cuda_graphs")
        waiting = "compiling the model…" if compiles else "taking the first step…"
        if is_finished := trainer.step >= max_steps:
            waiting = ""
        if self._console.is_jupyter:
            self._view = NotebookDisplay(summary, waiting, trainer.step, max_steps)
        elif self._console.is_terminal and not is_finished:
            self._view = _LiveTable(self._console, summary, waiting, max_steps)
        else:
            self._view = _Lines(self._console, summary, waiting)
        if is_finished:
            self._print(
                f"The run is already finished. To train longer, resume it with max_steps (--max-steps) above "
                f"{max_steps} and accept_changes=['schedule'] (--accept-changes schedule)."
            )
            if trainer.config.lr_schedule == "wsd":
                self._print("To resume it from before the decay, see Train for longer in the guide on checkpoints.")

    def on_step_end(self, trainer: "Trainer") -> None:
        """Show that steps are taken before the first one is logged."""
        if self._view is not None:
            self._view.on_step(trainer.step)

    def on_log(self, trainer: "Trainer", metrics: StepMetrics) -> None:
        """Show the metrics of a step."""
        self._has_logged = True
        if self._view is not None:
            self._view.on_log(metrics, format_metrics(metrics, trainer.config.max_steps))

    def on_evaluate(self, trainer: "Trainer", metrics: EvalMetrics) -> None:
        """Print the metrics of an evaluation."""
        bits = "" if metrics.bits_per_byte is None else f" | bits per byte {metrics.bits_per_byte:.4f}"
        line = f"step {metrics.step} | validation loss {metrics.loss:.4f} | perplexity {metrics.perplexity:,.2f}{bits}"
        if self._view is not None:
            self._view.on_evaluate(metrics, line)

    def on_save(self, trainer: "Trainer", path: Path) -> None:
        """Print the path of a checkpoint."""
        self._saved.append((trainer.step, path))
        self._print(f"step {trainer.step} | saving {_shortest(path)}")

    def on_step_skipped(self, trainer: "Trainer", steps: Sequence[SkippedStep]) -> None:
        """Print the skipped steps."""
        for skipped in steps:
            self._print(
                f"step {skipped.step} | skipped: {skipped.reason} | loss {skipped.loss:.4f} | "
                f"norm {skipped.grad_norm:.3f}"
            )

    def on_sample(self, trainer: "Trainer", samples: Sequence[TextSample]) -> None:
        """Print the texts."""
        for sample in samples:
            text = "\n  ".join(printable(sample.text).split("\n"))
            self._print(f"step {sample.step} | sample:\n  {text}")

    def on_train_end(self, trainer: "Trainer") -> None:
        """End the table and restore the cursor."""
        if self._view is None:
            return
        self._view.stop()
        if trainer.step < trainer.config.max_steps:
            saved_step = max([self._first_step] + [step for step, path in self._saved if path.exists()])
            saved = f"resume to continue from step {saved_step}" if saved_step else "there is no checkpoint to resume"
            self._print(f"step {trainer.step}/{trainer.config.max_steps} | stopped early; {saved}")
        if self._has_logged:
            for command in _curve_commands(trainer):
                self._print(f"curves: {command}")
        self._view = None
        self._console.file = self._file
        self._stream.close()

    def _print(self, line: str) -> None:
        if self._view is not None:
            self._view.print(line)


class _Lines:
    """Plain lines, for a pipe or a file.

    Args:
        console: Console to print to.
        summary: Description of the run.
        waiting: Text in place of the first row.
    """

    def __init__(self, console: Console, summary: str, waiting: str) -> None:
        self._console = console
        for line in filter(None, (summary, waiting)):
            self.print(line)

    def print(self, line: str) -> None:
        """Print a message."""
        self._console.print(Text(line))

    def on_step(self, step: int) -> None:
        """Show that a step has been taken."""

    def on_log(self, metrics: StepMetrics, cells: list[tuple[str, str]]) -> None:
        """Show the metrics of a step. `cells` are pairs of label and value."""
        self.print(" | ".join(f"{name} {value}" for name, value in cells))

    def on_evaluate(self, metrics: EvalMetrics, line: str) -> None:
        """Show the metrics of an evaluation, which the line describes."""
        self.print(line)

    def stop(self) -> None:
        """End the updates. Messages can still be printed."""


class _LiveTable(_Lines):
    """A table on a terminal. Its last row is live. Rows above it stay, at an interval that grows to a 20th of the run.

    Args:
        console: The terminal.
        summary: Description of the run.
        waiting: Text in place of the first row.
        max_steps: The run's last step, whose row stays.
    """

    def __init__(self, console: Console, summary: str, waiting: str, max_steps: int) -> None:
        self._row: Text | None = None  # the live row, unless it has been printed as one that stays
        self._stays = False  # whether the live row is to stay
        super().__init__(console, summary, "")
        self._max_steps = max_steps
        self._widths = _COLUMN_WIDTHS | {"step": 2 * len(str(max_steps)) + 1}
        self._first_step: int | None = None
        self._next_step = 0  # the next row to stay
        self._refreshed_at = 0.0
        self._live = Live(Text(waiting), console=console, auto_refresh=False, transient=True)
        self._live.start(refresh=True)

    def print(self, line: str) -> None:
        """Print a message above the live row."""
        self._keep_row()
        super().print(line)

    def on_step(self, step: int) -> None:
        """Show that steps are taken before there is a row."""
        if self._first_step is None:
            self._refresh(Text(f"step {step}/{self._max_steps}…"))

    def on_log(self, metrics: StepMetrics, cells: list[tuple[str, str]]) -> None:
        """Replace the live row."""
        self._keep_row()
        step = metrics.step
        if self._first_step is None:
            self._first_step = step
            self._console.print(Text(self._align([(name, name) for name, _ in cells]), "bold", no_wrap=True))
        self._row = Text(self._align(cells), no_wrap=True)
        self._stays = step >= min(self._next_step, self._max_steps)
        if self._stays:
            interval = max(1, min((step - self._first_step) // 2, self._max_steps // 20))
            self._next_step = (step // interval + 1) * interval
        self._refresh(self._row)

    def stop(self) -> None:
        """Let the last row stay, and restore the cursor."""
        self._stays = True
        self._keep_row()
        self._live.stop()

    def _refresh(self, live: Text) -> None:
        refresh = time.monotonic() - self._refreshed_at > _REFRESH_SECONDS
        self._live.update(live, refresh=refresh)
        if refresh:
            self._refreshed_at = time.monotonic()

    def _keep_row(self) -> None:
        """Print the current row permanently, if it is due."""
        if self._row is not None and self._stays:
            self._console.print(self._row)
            self._row = None

    def _align(self, cells: list[tuple[str, str]]) -> str:
        return "  ".join(value.rjust(max(len(name), self._widths.get(name, 0))) for name, value in cells)


def format_metrics(metrics: StepMetrics, max_steps: int) -> list[tuple[str, str]]:
    """Format the metrics of a step as pairs of label and value, in display order, without those that are unknown."""
    tokens_per_step = metrics.num_tokens / metrics.step
    remaining_tokens = (max_steps - metrics.step) * tokens_per_step
    remaining_seconds = remaining_tokens / max(metrics.tokens_per_second, 1e-9)
    mfu, memory = metrics.mfu, metrics.memory_bytes
    return [
        ("step", f"{metrics.step}/{max_steps}"),
        ("loss", f"{metrics.loss:.4f}"),
        ("lr", f"{metrics.learning_rate:.2e}"),
        ("norm", f"{metrics.grad_norm:.3f}"),
        ("tokens/s", f"{metrics.tokens_per_second:,.0f}"),
        *([] if mfu is None else [("MFU", f"{mfu:.1%}")]),
        *([] if memory is None else [("memory", f"{memory / 2**30:.1f} GiB")]),
        ("ETA", _format_duration(remaining_seconds)),
    ]


def _summary(trainer: "Trainer") -> str:
    model, batch, accelerator = trainer.model, trainer.batch, trainer.accelerator
    num_parameters = interface_of(model).num_parameters()
    num_trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    has_frozen = any(not parameter.requires_grad for parameter in model.parameters())
    trainable = f" ({num_trainable:,} trainable)" if has_frozen else ""
    return (
        f"{num_parameters:,} parameters{trainable} | {accelerator.device} × {accelerator.num_processes} | "
        f"{describe_precision(accelerator, trainer.config.mixed_precision)} | {class_names(trainer.optimizer)} | "
        f"batch {batch.global_batch_size} × {trainer.sequence_length} tokens "
        f"(micro-batch {batch.micro_batch_size}, accumulation {batch.accumulation_steps}) | "
        f"{'resumes at ' if trainer.step else ''}step {trainer.step}/{trainer.config.max_steps}\n"
        f"{describe_data(trainer)}"
    )


def describe_data(trainer: "Trainer") -> str:
    """Describe the size of the dataset and of the run, in tokens if the dataset has their number."""
    num_samples = len(trainer.train_dataset)  # type: ignore[arg-type]
    num_tokens = getattr(trainer.train_dataset, "num_tokens", None)
    size, unit = (num_tokens, "tokens") if isinstance(num_tokens, int) else (num_samples, "samples")
    num_trained = trainer.config.max_steps * trainer.batch.global_batch_size
    epochs = num_trained / num_samples
    rounded = f"{epochs:,.1f}" if epochs >= 1 else f"{epochs:.2g}"
    return f"dataset {size:,} {unit} | run {num_trained * size // num_samples:,} {unit}, {rounded} epochs"


def _curve_commands(trainer: "Trainer") -> Iterator[str]:
    """Yield the commands that show the curves of a run."""
    yield shlex.join(["homebrew", "plot", _shortest(trainer.config.output_dir)])
    for tracker in trainer.accelerator.trackers:
        if tracker.name == "tensorboard":
            yield shlex.join(["tensorboard", "--logdir", _shortest(tracker.logging_dir)])


def _shortest(path: str | Path) -> str:
    """Return a path as the user in the current folder would write it."""
    with contextlib.suppress(OSError, ValueError):  # the current folder has been removed, or does not contain the path
        return str(Path(path).absolute().relative_to(Path.cwd()))
    return str(path)


def _format_duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
