"""`RunLogger`: writes `run.json` and `metrics.jsonl`, and feeds Accelerate's trackers."""

import contextlib
import platform
import re
import secrets
from collections.abc import Sequence, Sized
from dataclasses import asdict, is_dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import accelerate
import torch
from torch.utils.data import Dataset

import homebrew
from homebrew.bounded_readers import read_json
from homebrew.callbacks.base import Callback
from homebrew.callbacks.trackers import finish_trackers, log_samples, start_trackers
from homebrew.data.tokenizer import dataset_tokenizer
from homebrew.distributed.collectives import run_on_main
from homebrew.errors import ConfigError, DataError
from homebrew.io import atomic_replace, remove_leftovers, strict_json, write_errors
from homebrew.metrics.metrics_log import MetricsLog
from homebrew.metrics.step_metrics import EvalMetrics, SkippedStep, StepMetrics, TextSample
from homebrew.model.interfaces import interface_of
from homebrew.optim.combined import class_names

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

    from homebrew.training.trainer import Trainer

_RUN_ID = re.compile("[0-9a-f]{8}")


class RunLogger(Callback):
    """Records a run: writes `run.json` and `metrics.jsonl`, and sends metrics to Accelerate's trackers.

    Only rank 0 writes files. `run.json` describes the run (configuration, optimizer, model, data, hardware,
    versions). `metrics.jsonl` has one event per line, with `"event"` being "begin" or "resume", "step", "evaluate",
    "save", "step_skipped" or "end".

    Args:
        command: Command that started the run, recorded in `run.json`.
    """

    def __init__(self, command: str | None = None) -> None:
        self._command = command
        self._log: MetricsLog | None = None
        self._started_trackers: list[GeneralTracker] = []

    def on_train_begin(self, trainer: "Trainer") -> None:
        """Write `run.json`, open `metrics.jsonl` and start the trackers.

        Raises:
            ConfigError: Rank 0 cannot write to `output_dir` or start a tracker. Raised on all ranks.
        """
        run_on_main(trainer.accelerator, partial(self._start, trainer, describe_run(trainer)))

    def on_log(self, trainer: "Trainer", metrics: StepMetrics) -> None:
        """Record the metrics of a step."""
        self._record("step", trainer, asdict(metrics))

    def on_evaluate(self, trainer: "Trainer", metrics: EvalMetrics) -> None:
        """Record the metrics of an evaluation."""
        self._record("evaluate", trainer, asdict(metrics))

    def on_save(self, trainer: "Trainer", path: Path) -> None:
        """Record a checkpoint."""
        if self._log is not None:
            self._log.write("save", step=trainer.step, path=str(path))

    def on_step_skipped(self, trainer: "Trainer", steps: Sequence[SkippedStep]) -> None:
        """Record the skipped steps."""
        if self._log is not None:
            for skipped in steps:
                self._log.write("step_skipped", **asdict(skipped))

    def on_sample(self, trainer: "Trainer", samples: Sequence[TextSample]) -> None:
        """Send texts to the trackers that show them."""
        log_samples(trainer.accelerator.trackers, samples, trainer.step)

    def on_train_end(self, trainer: "Trainer") -> None:
        """Close the file and finish the trackers this run started.

        `Accelerator.end_training` is not used, because it also destroys the process group.
        """
        if self._log is not None:
            self._log.write("end", step=trainer.step)
            self._log.close()
            self._log = None
        started, self._started_trackers = self._started_trackers, []
        trainer.accelerator.trackers = [tracker for tracker in trainer.accelerator.trackers if tracker not in started]
        finish_trackers(started)

    def _start(self, trainer: "Trainer", description: dict[str, Any]) -> None:
        folder, accelerator = Path(trainer.config.output_dir), trainer.accelerator
        earlier = _earlier_description(folder) if trainer.step else None
        description = {"command": self._command, "run_id": _run_id(folder, earlier)} | description
        self._log = self._open_files(folder, description)
        self._log.write("resume" if trainer.step else "begin", step=trainer.step)
        if not accelerator.trackers:  # otherwise the caller has started them, and finishes them
            self._started_trackers = start_trackers(accelerator, description, name=folder.name, step=trainer.step)

    def _open_files(self, folder: Path, description: dict[str, Any]) -> MetricsLog:
        with write_errors(folder, ConfigError, "Check the permissions and the disk, or choose another output_dir."):
            remove_leftovers(folder / "run.json")
            with atomic_replace(folder / "run.json") as path:
                path.write_text(strict_json(description, indent=2, default=str) + "\n", encoding="utf-8")
            return MetricsLog(folder / "metrics.jsonl")

    def _record(self, event: str, trainer: "Trainer", metrics: dict[str, Any]) -> None:
        if self._log is not None:
            self._log.write(event, **metrics)
        prefix = "eval" if event == "evaluate" else "train"
        values = {f"{prefix}/{name}": value for name, value in metrics.items() if name != "step" and value is not None}
        trainer.accelerator.log(values, step=metrics["step"])


def describe_run(trainer: "Trainer") -> dict[str, Any]:
    """Return the contents of `run.json`: configuration, optimizer, model, data, hardware and versions."""
    accelerator = trainer.accelerator
    config = asdict(trainer.config)
    model = interface_of(trainer.model)
    return {
        "config": config | {"output_dir": str(config["output_dir"])},
        "optimizer": describe_optimizer(trainer.optimizer),
        "schedule": describe_schedule(trainer.schedule),
        "model": model.description() | {"init": model.init, "num_parameters": model.num_parameters()},
        "train_dataset": describe_dataset(trainer.train_dataset),
        "eval_dataset": None if trainer.eval_dataset is None else describe_dataset(trainer.eval_dataset),
        "batch": asdict(trainer.batch),
        "device": str(accelerator.device),
        "num_processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        "versions": {
            "homebrew": homebrew.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "accelerate": accelerate.__version__,
        },
    }


def describe_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the name of an optimizer's class, or of several, and the plain settings of each parameter group."""
    groups = [
        {"num_parameters": sum(parameter.numel() for parameter in group["params"]), "lr": float(group["lr"])}
        | {
            str(name): value
            for name, value in group.items()
            if name != "lr" and isinstance(value, int | float | str | tuple)
        }
        for group in optimizer.param_groups
    ]
    return {"class": class_names(optimizer), "groups": groups}


def describe_schedule(schedule: object) -> str:
    """Return the name of a schedule, and the settings of a built-in one."""
    return repr(schedule) if is_dataclass(schedule) else getattr(schedule, "__qualname__", type(schedule).__name__)


def describe_dataset(dataset: Dataset[Any]) -> dict[str, Any]:
    """Return the number of samples and, if the dataset has them, its source, fingerprint and tokenizer."""
    description: dict[str, Any] = {"num_samples": len(cast("Sized", dataset))}
    for name in ("source", "fingerprint", "num_tokens"):
        if hasattr(dataset, name):
            description[name] = getattr(dataset, name)
    tokenizer = dataset_tokenizer(dataset)
    return description | ({} if tokenizer is None else {"tokenizer": tokenizer.name})


def _earlier_description(folder: Path) -> Any:  # noqa: ANN401 - whatever the file holds
    """Return the contents of a folder's `run.json`, or None if it cannot be read; it is then replaced."""
    with contextlib.suppress(DataError):
        return read_json(folder / "run.json", DataError)
    return None


def _run_id(folder: Path, earlier: Any) -> str:  # noqa: ANN401 - as above
    """Return the id by which trackers know a run: a new one, or that of the run that is resumed in its folder."""
    match earlier:
        case {"run_id": str(run_id), "config": {"output_dir": str(written_in)}}:
            is_copy = Path(written_in).resolve() != folder.resolve()  # which is another run
            if not is_copy and _RUN_ID.fullmatch(run_id):
                return run_id
    return secrets.token_hex(4)
