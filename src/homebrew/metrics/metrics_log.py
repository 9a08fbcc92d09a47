"""The files `metrics.jsonl` and `samples.jsonl`: their writer, their reader, and a reader of past evaluation losses."""

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from homebrew.bounded_readers import parse_json
from homebrew.errors import DataError
from homebrew.io import open_regular, strict_json
from homebrew.user_warnings import warn

_MAX_LINE_BYTES = 1 << 16
_LINE_START = b'{"event": '


class MetricsLog:
    """Append-only file of JSON lines, one event per line.

    If the process is killed, at most the last line is incomplete. If the disk is full, events are dropped with a
    warning instead of stopping the run.

    Args:
        path: File to append to. An incomplete last event, left by a killed run, is removed.

    Raises:
        OSError: The file cannot be opened for writing, or is not a regular file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._has_warned = False
        self._file = open_regular(path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
        self._remove_incomplete_event()

    def write(self, event: str, **values: Any) -> None:  # noqa: ANN401 - any JSON value
        """Append one event.

        Args:
            event: Kind of event, such as "step" or "evaluate".
            values: Fields of the event. Non-finite numbers are written as null.
        """
        try:
            self._append(strict_json({"event": event} | values).encode() + b"\n")
        except OSError as error:
            if not self._has_warned:
                problem = f"{self._path} could not be written: {error.strerror}."
                warn(f"{problem} Training continues without logging to it. Free some space.")
            self._has_warned = True
        else:
            self._has_warned = False

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):  # a warning has reported the events that were not written
            os.close(self._file)

    def _append(self, line: bytes) -> None:
        end = os.fstat(self._file).st_size
        try:
            while line:
                line = line[os.write(self._file, line) :]
        except OSError:
            with contextlib.suppress(OSError):  # the first error is the one to report
                os.ftruncate(self._file, end)  # a partial line would corrupt the next one
            raise

    def _remove_incomplete_event(self) -> None:
        start = max(0, os.fstat(self._file).st_size - _MAX_LINE_BYTES)
        *_, last_line = os.pread(self._file, _MAX_LINE_BYTES, start).rpartition(b"\n")
        event = last_line.strip(b"\0")  # a power failure can leave zeros
        if _LINE_START.startswith(event[: len(_LINE_START)]):
            os.ftruncate(self._file, os.fstat(self._file).st_size - len(last_line))
        else:  # not written by a run
            os.write(self._file, b"\n")


def past_eval_losses(path: Path, step: int) -> dict[int, float]:
    """Read the losses of a run's evaluations up to a step, in order, by the step of the evaluation.

    If the run was resumed from an earlier step, evaluations after that step are discarded. A file that does not exist
    has no losses.
    """
    losses: dict[int, float] = {}
    for event in read_events(path):
        match event:
            case {"event": "begin" | "resume", "step": int(start)}:
                losses = {eval_step: loss for eval_step, loss in losses.items() if eval_step <= start}
            case {"event": "evaluate", "step": int(eval_step), "loss": float() | None as loss}:
                losses[eval_step] = math.inf if loss is None else loss
    return {eval_step: loss for eval_step, loss in losses.items() if eval_step <= step}


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the JSON object of each line. Lines without one are ignored. A file that does not exist has no lines.

    Raises:
        OSError: The file cannot be opened or is not a regular file.
    """
    try:
        descriptor = open_regular(path)
    except FileNotFoundError:
        return
    with os.fdopen(descriptor, "rb") as file:
        while line := file.readline(_MAX_LINE_BYTES):
            if line.startswith(b"{"):  # a power failure can leave arbitrary bytes
                with contextlib.suppress(DataError):
                    yield parse_json(line, path, DataError)
