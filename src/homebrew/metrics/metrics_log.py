"""The file `metrics.jsonl`: its writer, and a reader of past evaluation losses."""

import json
import math
import os
import warnings
from pathlib import Path
from typing import Any


class MetricsLog:
    """Append-only file of JSON lines, one event per line.

    If the process is killed, at most the last line is incomplete. If the disk is full, events are dropped with a
    warning instead of stopping the run.

    Args:
        path: File to append to. An incomplete last line, left by a killed run, is removed.

    Raises:
        OSError: The file cannot be opened for writing.
    """

    def __init__(self, path: Path) -> None:
        _remove_incomplete_line(path)
        self._path = path
        self._has_warned = False
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def write(self, event: str, **values: Any) -> None:  # noqa: ANN401 - any JSON value
        """Append one event.

        Args:
            event: Kind of event, such as "step" or "evaluate".
            values: Fields of the event. Non-finite numbers are written as null, because JSON has no NaN or infinity.
        """
        fields = {"event": event} | {name: _to_json(value) for name, value in values.items()}
        line = json.dumps(fields).encode() + b"\n"
        end = os.fstat(self._file).st_size
        try:
            while line:
                line = line[os.write(self._file, line) :]
        except OSError as error:
            os.ftruncate(self._file, end)  # a partial line would corrupt the next one
            if not self._has_warned:
                problem = f"{self._path} could not be written: {error.strerror}."
                warnings.warn(f"{problem} Training continues without logging metrics. Free some space.", stacklevel=5)
            self._has_warned = True
        else:
            self._has_warned = False

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def past_eval_losses(path: Path, step: int) -> list[float]:
    """Read the losses of a run's evaluations up to a step, in order.

    Evaluations that a resume discarded, because the run restarted from an earlier step, are not returned. A file that
    does not exist has no losses.
    """
    losses: dict[int, float] = {}
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            event = json.loads(line)
        except ValueError:  # a power failure can leave arbitrary bytes
            continue
        match event:
            case {"event": "begin" | "resume", "step": int(start)}:
                losses = {eval_step: loss for eval_step, loss in losses.items() if eval_step <= start}
            case {"event": "evaluate", "step": int(eval_step), "loss": float() | None as loss}:
                losses[eval_step] = math.inf if loss is None else loss
    return [loss for eval_step, loss in losses.items() if eval_step <= step]


def _to_json(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _remove_incomplete_line(path: Path) -> None:
    if not path.exists():
        return
    with path.open("rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
