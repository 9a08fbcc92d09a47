"""Reads the logs in a run's folder, each step once."""

import math
import os
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from homebrew.bounded_readers import read_json
from homebrew.errors import DataError
from homebrew.io import absolute_path
from homebrew.metrics.metrics_log import read_events
from homebrew.metrics.run_settings import Settings, flatten_settings
from homebrew.metrics.step_metrics import TextSample
from homebrew.user_warnings import warn

XAxis = Literal["steps", "tokens", "seconds"]

_STEP_COLUMNS = ("step", "loss", "learning_rate", "grad_norm", "tokens_per_second", "num_tokens", "elapsed_seconds")
_X_COLUMNS = {"steps": "step", "tokens": "num_tokens", "seconds": "elapsed_seconds"}
_MAX_STEP = 2**53


class Rows:
    """Rows of numbers. The first column is the step, which increases from row to row.

    Args:
        columns: Names of the columns.
    """

    def __init__(self, columns: Sequence[str]) -> None:
        self._columns = columns
        self._values = array("d")  # a long run has millions of rows

    def __len__(self) -> int:
        return len(self._values) // len(self._columns)

    def __getitem__(self, column: str) -> NDArray[np.float64]:
        return np.array(self._values).reshape(len(self), len(self._columns))[:, self._columns.index(column)]

    def append(self, step: int, *others: float) -> None:
        """Add a row. Existing rows of this step and later steps are removed: the run has repeated these steps."""
        self.cut(step - 1)
        self._values.extend((step, *others))

    def cut(self, step: int) -> None:
        """Remove the rows after a step."""
        while self._values and self._values[-len(self._columns)] > step:
            del self._values[-len(self._columns) :]


@dataclass(frozen=True)
class RunRecord:
    """The logs of a run. If steps were repeated after a resume, only the repetition is included."""

    folder: Path
    settings: Settings = field(default_factory=dict)
    """Contents of `run.json`; empty if there is no such file."""
    steps: Rows = field(default_factory=lambda: Rows(_STEP_COLUMNS))
    """The fields of `StepMetrics` at the logged steps. `elapsed_seconds` continues when the run is resumed."""
    evaluations: Rows = field(default_factory=lambda: Rows(("step", "loss")))
    skipped: Rows = field(default_factory=lambda: Rows(("step",)))
    """Steps whose update was not applied."""
    resumes: Rows = field(default_factory=lambda: Rows(("step",)))
    """Steps from which the run was resumed."""
    samples: list[TextSample] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The folder's name."""
        return Path(os.path.normpath(self.folder)).name

    def positions(self, x: XAxis, steps: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the positions of steps on an x-axis. Between logged steps, tokens and seconds are interpolated."""
        return steps if x == "steps" else np.interp(steps, self.steps["step"], self.steps[_X_COLUMNS[x]])

    def restart(self, step: int) -> None:
        """Discard what was recorded after a step from which the run was resumed or restarted."""
        for rows in (self.steps, self.evaluations, self.skipped, self.resumes):
            rows.cut(step)


def read_runs(folders: Iterable[str | Path]) -> list[RunRecord]:
    """Read runs. A folder that is not a run stands for the runs in it.

    Runs without logged steps are left out with a warning. If no run has logged steps, an error is raised.

    Raises:
        DataError: As in `find_runs` and `read_run`.
    """
    found = find_runs(folders)
    runs, errors = [], []
    for folder in found:
        try:
            runs.append(read_run(folder))
        except EmptyRunError as error:
            errors.append(error)
    if not runs:
        raise EmptyRunError(f"{errors[0]} Wait until the run has logged a step, or pass another run.")
    for problem in errors:
        warn(f"{problem} It is left out.")
    return runs


class EmptyRunError(DataError):
    """A run has no logged steps."""


def find_runs(folders: Iterable[str | Path]) -> list[Path]:
    """Return the folders of runs. A given folder that is not a run is replaced by the runs in it.

    Raises:
        DataError: A folder does not exist, or neither is a run nor contains one.
    """
    found: dict[Path, None] = {}  # without duplicates, in order
    for folder in map(absolute_path, folders):
        if os.path.isfile(folder):  # noqa: PTH113 - os.path never raises
            raise DataError(f"{folder} is a file. Pass the folder of a run.")
        if not os.path.isdir(folder):  # noqa: PTH112
            raise DataError(f"There is no folder {folder}. Pass the folder of a run.")
        try:
            runs = [folder] if _is_run(folder) else sorted(filter(_is_run, folder.iterdir()))
        except OSError as error:
            raise DataError(f"{folder} cannot be read: {error.strerror}. Check its permissions.") from error
        if not runs:
            raise DataError(f"{folder} has no metrics.jsonl. Pass the folder of a run, or one that contains runs.")
        found |= dict.fromkeys(runs)
    return list(found)


def read_run(folder: Path) -> RunRecord:
    """Read the logs of a run, which may still be in progress.

    Raises:
        DataError: A file cannot be read or is too large.
        EmptyRunError: No step has been logged.
    """
    has_settings = os.path.lexists(folder / "run.json")
    settings = flatten_settings(read_json(folder / "run.json", DataError)) if has_settings else {}
    run = RunRecord(folder, settings)
    try:
        _read_metrics(run, folder / "metrics.jsonl")
        _read_samples(run, folder / "samples.jsonl")
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}. It must be a regular file.") from error
    if not len(run.steps):
        raise EmptyRunError(f"{folder} has no logged steps.")
    return run


def _is_run(folder: Path) -> bool:
    return os.path.lexists(folder / "metrics.jsonl")


def _read_metrics(run: RunRecord, path: Path) -> None:
    seconds = 0.0  # training time in earlier processes of this run
    for event in read_events(path):
        match event:
            case {"event": "begin" | "resume" as kind, "step": int(start)} if _is_step(start):
                run.restart(start)
                seconds = float(run.steps["elapsed_seconds"][-1]) if len(run.steps) else 0.0
                if kind == "resume":
                    run.resumes.append(start)
            case {"event": "step", "step": int(step)} if _is_step(step):
                values = [_number(event.get(name)) for name in _STEP_COLUMNS[1:]]
                run.steps.append(step, *values[:-1], seconds + values[-1])
            case {"event": "evaluate", "step": int(step)} if _is_step(step):
                run.evaluations.append(step, _number(event.get("loss")))
            case {"event": "step_skipped", "step": int(step)} if _is_step(step):
                run.skipped.append(step)


def _read_samples(run: RunRecord, path: Path) -> None:
    if not os.path.lexists(path):
        return
    for event in read_events(path):
        match event:
            case {"event": "begin" | "resume", "step": int(start)}:
                run.samples[:] = [sample for sample in run.samples if sample.step <= start]
            case {"event": "sample", "step": int(step), "prompt": str(prompt), "text": str(text)} if _is_step(step):
                run.samples.append(TextSample(step, prompt, text))


def _is_step(step: int) -> bool:
    return 0 <= step <= _MAX_STEP


def _number(value: object) -> float:
    """Return a JSON number, or NaN for null, other values and numbers out of range."""
    return float(value) if isinstance(value, int | float) and abs(value) < 1e300 else math.nan
