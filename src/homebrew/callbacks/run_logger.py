"""What a run leaves to read: `run.json`, `metrics.jsonl` and the trackers."""

import json
import platform
from collections.abc import Sequence, Sized
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import accelerate
import torch
from accelerate import Accelerator
from torch.utils.data import Dataset

from homebrew.callbacks.base import Callback
from homebrew.data.tokenizer import dataset_tokenizer
from homebrew.distributed.collectives import run_on_main
from homebrew.errors import ConfigError
from homebrew.io import atomic_replace
from homebrew.metrics.step_metrics import EvalMetrics, MetricsLog, SkippedStep, StepMetrics

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

    from homebrew.training.trainer import Trainer


class RunLogger(Callback):
    """Writes a run's facts and figures, on the first process, and passes the figures to Accelerate's trackers."""

    def __init__(self) -> None:
        self._log: MetricsLog | None = None
        self._trackers: list[GeneralTracker] = []  # which the run has started

    def on_train_begin(self, trainer: "Trainer") -> None:
        """Write `run.json`, open `metrics.jsonl`, start the trackers.

        Raises:
            ConfigError: on every process, if the first cannot write to `output_dir`.
        """
        facts = run_facts(trainer)
        run_on_main(trainer.accelerator, partial(self._open, Path(trainer.config.output_dir), facts))
        if self._log is not None:
            self._log.write("resume" if trainer.step else "begin", step=trainer.step)
        self._start_trackers(trainer.accelerator, facts)

    def on_log(self, trainer: "Trainer", metrics: StepMetrics) -> None:
        """Record a step's figures."""
        self._record("step", trainer, asdict(metrics))

    def on_evaluate(self, trainer: "Trainer", metrics: EvalMetrics) -> None:
        """Record an evaluation."""
        self._record("evaluate", trainer, asdict(metrics))

    def on_save(self, trainer: "Trainer", path: Path) -> None:
        """Record a checkpoint."""
        if self._log is not None:
            self._log.write("save", step=trainer.step, path=str(path))

    def on_step_skipped(self, trainer: "Trainer", steps: Sequence[SkippedStep]) -> None:
        """Record steps whose updates were not applied."""
        if self._log is not None:
            for held in steps:
                self._log.write("held_back", **asdict(held))

    def on_train_end(self, trainer: "Trainer") -> None:
        """Close the file and the run's trackers; the process group stays for what the script does next."""
        if self._log is not None:
            self._log.write("end", step=trainer.step)
            self._log.close()
            self._log = None
        ours, self._trackers = self._trackers, []
        trainer.accelerator.trackers = [tracker for tracker in trainer.accelerator.trackers if tracker not in ours]
        for tracker in ours:
            tracker.finish()

    def _open(self, folder: Path, facts: dict[str, Any]) -> None:
        """On the first process: write the facts, whole or not at all, and open the file of figures."""
        try:
            with atomic_replace(folder / "run.json") as path:
                path.write_text(json.dumps(facts, indent=2, default=str) + "\n", encoding="utf-8")
            self._log = MetricsLog(folder / "metrics.jsonl")
        except OSError as error:
            raise ConfigError(
                f"output_dir={str(folder)!r} cannot take run.json and metrics.jsonl: {error}. Make room, look at "
                f"the permissions there, or choose another folder."
            ) from error

    def _start_trackers(self, accelerator: Accelerator, facts: dict[str, Any]) -> None:
        """Start the Accelerator's trackers; those that run get the figures too, but who started them ends them."""
        if accelerator.trackers:
            return
        try:
            accelerator.init_trackers("homebrew", config=_flat(facts))
        except BaseException:
            accelerator.trackers = []  # or the next run would take them to be running
            raise
        self._trackers = list(accelerator.trackers)

    def _record(self, kind: str, trainer: "Trainer", figures: dict[str, Any]) -> None:
        if self._log is not None:
            self._log.write(kind, **figures)
        prefix = "eval" if kind == "evaluate" else "train"
        numbers = {f"{prefix}/{k}": v for k, v in figures.items() if k != "step" and v is not None}
        trainer.accelerator.log(numbers, step=figures["step"])


def run_facts(trainer: "Trainer") -> dict[str, Any]:
    """What made the run: settings, model, data, processes and versions."""
    accelerator = trainer.accelerator
    config = asdict(trainer.config)
    return {
        "config": config | {"output_dir": str(config["output_dir"])},
        "model": asdict(trainer.model.config) | {"num_parameters": trainer.model.num_parameters()},
        "train_dataset": dataset_facts(trainer.train_dataset),
        "eval_dataset": None if trainer.eval_dataset is None else dataset_facts(trainer.eval_dataset),
        "batch": asdict(trainer.batch),
        "device": str(accelerator.device),
        "num_processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "accelerate": accelerate.__version__,
        },
    }


def dataset_facts(dataset: Dataset[Any]) -> dict[str, Any]:
    """What is known of a dataset: its size and, where it says so, its source and fingerprint."""
    facts: dict[str, Any] = {"num_samples": len(cast("Sized", dataset))}
    for name in ("source", "fingerprint", "num_tokens"):
        if hasattr(dataset, name):
            facts[name] = getattr(dataset, name)
    tokenizer = dataset_tokenizer(dataset)
    return facts | ({} if tokenizer is None else {"tokenizer": tokenizer.name})


def _flat(facts: dict[str, Any], prefix: str = "") -> dict[str, int | float | str | bool]:
    """Nested facts as the flat scalars a tracker takes."""
    flat: dict[str, int | float | str | bool] = {}
    for key, value in facts.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}/")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, int | float | str | bool) else str(value)
    return flat
