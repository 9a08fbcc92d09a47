"""Learning curves of several variants: training, steps and seconds to a target loss, tables and a plot."""

import gc
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from harness import GIB, ON_GPU, format_number
from implementations import IsolatedAccelerate, StopTraining

from homebrew import GPT, Callback, EvalMetrics, StepMetrics, TokenDataset, Trainer, TrainerConfig


@dataclass(frozen=True)
class Run:
    """A run of one variant with one seed. The lists have one value per evaluation."""

    steps: list[int]
    losses: list[float]
    """Validation losses in nats per token."""
    seconds: list[float]
    """Seconds of training steps, from step 0, without compilation and evaluations."""
    peak_bytes: int | None
    """Peak GPU memory in bytes."""
    variant: str
    seed: int
    settings: dict[str, Any]
    """The variant's fields of `TrainerConfig`, `dropout`, `init` and `plain`."""
    experiment: dict[str, Any]
    """What all variants have in common: model, batch and corpus."""
    machine: str


def train_and_record(model: GPT, train: TokenDataset, val: TokenDataset, config: TrainerConfig) -> dict[str, Any]:
    """Train once without checkpoints. Return the measured fields of `Run`.

    `config.log_every` has to be `config.eval_every`.
    """
    recorder = _Recorder()
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    try:
        with suppress(StopTraining), IsolatedAccelerate():
            Trainer(model, train, val, config=config, callbacks=[recorder], progress=False).train(overwrite=True)
    finally:
        if ON_GPU:
            torch.compiler.reset()  # frees compiled code and the memory of CUDA graphs
            gc.collect()
            torch.cuda.empty_cache()
    steps, losses = list(recorder.losses), list(recorder.losses.values())
    seconds = training_seconds(recorder.seconds, steps)
    return {"steps": steps, "losses": losses, "seconds": seconds, "peak_bytes": recorder.peak_bytes}


def training_seconds(logged: dict[int, float], steps: Sequence[int]) -> list[float]:
    """Return the seconds of training from step 0 to each evaluation.

    In the steps up to the first evaluation, the optimizer's kernels are still compiled and CUDA graphs are captured, so
    each of these steps counts as the mean of the later steps.

    Args:
        logged: Seconds from step 0 to each logged step.
        steps: Steps of the evaluations, at least two. Each is a logged step.
    """
    first, last = steps[0], steps[-1]
    per_step = (logged[last] - logged[first]) / (last - first)
    return [first * per_step + logged[step] - logged[first] for step in steps]


class _Recorder(Callback):
    """Records validation losses and seconds."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}
        self.seconds: dict[int, float] = {}
        """Seconds from step 0 to each logged step, by the Trainer's throughput meter, which reads the GPU's own clock
        and leaves out evaluations and the compilation before the first step."""
        self.peak_bytes: int | None = None
        self._seconds = 0.0
        self._num_tokens = 0

    def on_log(self, trainer: Trainer, metrics: StepMetrics) -> None:
        self._seconds += (metrics.num_tokens - self._num_tokens) / metrics.tokens_per_second
        self._num_tokens = metrics.num_tokens
        self.seconds[metrics.step] = self._seconds
        self.peak_bytes = metrics.memory_bytes

    def on_evaluate(self, trainer: Trainer, metrics: EvalMetrics) -> None:
        self.losses[metrics.step] = metrics.loss
        if metrics.step == trainer.config.max_steps:
            raise StopTraining


Variants = dict[str, list[Run]]
"""The runs of each variant, one per seed."""


def by_variant(runs: Sequence[Run]) -> Variants:
    """Group runs by variant, in the order of the first run of each."""
    variants: Variants = {}
    for run in runs:
        variants.setdefault(run.variant, []).append(run)
    return variants


def first_reached(positions: Sequence[float], losses: Sequence[float], target: float) -> float | None:
    """Return the step or second at which a curve first reaches a target, interpolated between evaluations, or None."""
    for i, loss in enumerate(losses):
        if loss <= target:
            if i == 0:
                return positions[0]
            fraction = (losses[i - 1] - target) / (losses[i - 1] - loss)
            return positions[i - 1] + fraction * (positions[i] - positions[i - 1])
    return None


def best_adamw(variants: Variants) -> str | None:
    """Return the AdamW variant with the lowest mean final loss, or None if there is none."""
    names = [name for name, runs in variants.items() if runs[0].settings.get("optimizer", "adamw") == "adamw"]
    return min(names, key=lambda name: final_loss(variants[name]), default=None)


def final_loss(runs: Sequence[Run]) -> float:
    """Return the mean loss of the last evaluation."""
    return mean(run.losses[-1] for run in runs)


def summary_rows(variants: Variants) -> list[dict[str, str]]:
    """Return a table row for each variant: its losses, time and memory."""
    rows = []
    for name, runs in variants.items():
        peaks = [run.peak_bytes for run in runs if run.peak_bytes is not None]
        row = {"variant": name, "seeds": str(len(runs)), "steps": str(runs[0].steps[-1])}
        row["final loss"] = with_spread([run.losses[-1] for run in runs], ".4f")
        row["best loss"] = with_spread([min(run.losses) for run in runs], ".4f")
        row["seconds"] = with_spread([run.seconds[-1] for run in runs], ".1f")
        row["ms per step"] = format_number(mean(1000 * run.seconds[-1] / run.steps[-1] for run in runs))
        rows.append(row | {"peak GiB": f"{max(peaks) / GIB:.1f}" if peaks else ""})
    return rows


def target_rows(variants: Variants, target: float, *, full_runs: Sequence[Run]) -> list[dict[str, str]]:
    """Return a table row for each variant: steps and seconds to a target loss, absolute and relative to full runs."""
    total_steps = mean(run.steps[-1] for run in full_runs)
    total_seconds = mean(run.seconds[-1] for run in full_runs)
    rows = []
    for name, runs in variants.items():
        steps = [step for run in runs if (step := first_reached(run.steps, run.losses, target)) is not None]
        seconds = [time for run in runs if (time := first_reached(run.seconds, run.losses, target)) is not None]
        row = {"variant": name, "reached by": f"{len(steps)} of {len(runs)}"}
        if len(steps) < len(runs):  # the mean of some of the seeds would leave out the worst
            steps, seconds = [], []
        row["steps"] = with_spread(steps, ".1f")
        row["steps ratio"] = with_spread([value / total_steps for value in steps], ".3f")
        row["seconds"] = with_spread(seconds, ".1f")
        row["seconds ratio"] = with_spread([value / total_seconds for value in seconds], ".3f")
        rows.append(row)
    return rows


def plain_pairs(variants: Variants) -> list[tuple[str, str]]:
    """Return pairs of variants that differ only in `plain`, which is True in the second of each pair."""

    def key(name: str) -> dict[str, Any]:
        return {key: value for key, value in variants[name][0].settings.items() if key != "plain"}

    plain = {name for name, runs in variants.items() if runs[0].settings.get("plain")}
    return [(a, b) for b in variants if b in plain for a in variants if a not in plain and key(a) == key(b)]


def difference_rows(fast: Sequence[Run], plain: Sequence[Run]) -> list[dict[str, str]]:
    """Return a table row for each evaluation: the difference between two variants, and the spread over seeds."""
    by_seed = {run.seed: run.losses for run in plain}
    pairs = [(run.losses, by_seed[run.seed]) for run in fast if run.seed in by_seed]
    rows = []
    for index, step in enumerate(fast[0].steps):
        losses = [(a[index], b[index]) for a, b in pairs]
        differences = [a - b for a, b in losses]
        row = {"step": str(step), "fast": f"{mean(a for a, _ in losses):.4f}"}
        row |= {"plain": f"{mean(b for _, b in losses):.4f}", "fast − plain": f"{mean(differences):+.4f}"}
        row["largest of a seed"] = f"{max(map(abs, differences)):.4f}"
        rows.append(row | {"σ of plain over seeds": f"{stdev(b for _, b in losses):.4f}" if len(losses) > 1 else ""})
    return rows


def with_spread(values: Sequence[float], style: str) -> str:
    """Format the mean and, of several values, the standard deviation. No values give an empty string."""
    spread = f" ± {stdev(values):{style}}" if len(values) > 1 else ""
    return f"{mean(values):{style}}{spread}" if values else ""


def plot(variants: Variants, path: Path, *, title: str, target: float | None) -> None:
    """Draw validation loss against steps and against seconds, one line per run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for color, (name, runs) in enumerate(variants.items()):
        for run in runs:
            for axes, positions in zip(panels, (run.steps, run.seconds), strict=True):
                axes.plot(positions, run.losses, color=f"C{color}", linewidth=1, label=name if run is runs[0] else None)
    for axes, label in zip(panels, ("steps", "seconds of training, without compilation"), strict=True):
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
        if target is not None:
            axes.axhline(target, color="black", linewidth=1, linestyle="--")
    panels[0].set_ylabel("validation loss")
    panels[1].legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
