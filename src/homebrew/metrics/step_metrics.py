"""A run's figures, and the file they are kept in."""

import json
import math
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch

_PEAK_TFLOPS: dict[str, dict[str, float]] = {
    # Dense tensor-core peaks from the vendors' datasheets, by what `_card` leaves of a device's name.
    "B200": {"bfloat16": 2250, "float32": 1125},
    "H200": {"bfloat16": 989, "float32": 494},
    "H200 NVL": {"bfloat16": 835, "float32": 417},
    "GH200": {"bfloat16": 989, "float32": 494},
    "H100": {"bfloat16": 989, "float32": 494},
    "H100 NVL": {"bfloat16": 835, "float32": 417},
    "H100 PCIE": {"bfloat16": 756, "float32": 378},
    "A100": {"bfloat16": 312, "float32": 156},
    "A100 PCIE": {"bfloat16": 312, "float32": 156},
    "L40S": {"bfloat16": 362, "float32": 183},
    "L40": {"bfloat16": 181, "float32": 90},
    "L4": {"bfloat16": 121, "float32": 60},
    "A10G": {"bfloat16": 70, "float32": 35},
    "RTX 5090": {"bfloat16": 209.5, "float32": 104.8},
    "RTX 4090": {"bfloat16": 165.2, "float32": 82.6},
    "RTX 3090": {"bfloat16": 71, "float32": 35.6},
    "T4": {"float16": 65},
    "V100": {"float16": 125},
    "V100 PCIE": {"float16": 112},
}
_SAYS_NOTHING_OF_SPEED = re.compile(r"NVIDIA|TESLA|GEFORCE|SXM\d?|HBM3E?|\d+GB?")
"""Words of a name that cards of one speed differ in; any other ("Laptop", "MIG") makes it a card that is not known."""


@dataclass(frozen=True)
class StepMetrics:
    """What is reported of a step."""

    step: int
    """Optimizer steps taken."""
    loss: float
    """Mean over the step's scored targets, in nats."""
    learning_rate: float
    """Of the first parameter group."""
    grad_norm: float
    """Global, before clipping."""
    tokens_per_second: float
    """Over all processes, since the last report, without the time of compiling, evaluations and saves."""
    mfu: float | None
    """Model FLOPs as a share of the devices' peak (Chowdhery et al. 2022, PaLM); None where that is not known."""
    memory_bytes: int | None
    """The device allocator's peak; None off CUDA."""
    num_tokens: int
    """Since the run's start."""
    elapsed_seconds: float
    """Since this process began training."""


@dataclass(frozen=True)
class EvalMetrics:
    """What an evaluation found."""

    step: int
    """Optimizer steps taken."""
    loss: float
    """Mean over all scored targets, in nats."""
    perplexity: float
    """exp(loss)."""
    bits_per_byte: float | None
    """Comparable between tokenizers; None where the text's bytes are not known."""
    num_tokens: int
    """Scored targets."""

    @classmethod
    def of(cls, *, step: int, loss: float, num_tokens: int, bytes_per_token: float | None) -> Self:
        """The figures that follow from a loss.

        Args:
            step: optimizer steps taken.
            loss: in nats a token.
            num_tokens: scored targets.
            bytes_per_token: of the text, where it is known.
        """
        bits = None if bytes_per_token is None else loss / math.log(2) / bytes_per_token
        return cls(step, loss, math.exp(loss) if loss < 700 else math.inf, bits, num_tokens)


@dataclass(frozen=True)
class SkippedStep:
    """A step whose update was not applied."""

    step: int
    """Counted from 0."""
    reason: Literal["non_finite", "loss_spike"]
    loss: float
    grad_norm: float


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Dense matrix-product peak of a device, in FLOP/s; None where it is not known."""
    if device.type != "cuda":
        return None
    peaks = _PEAK_TFLOPS.get(_card(torch.cuda.get_device_name(device)), {})
    kind = str(dtype).removeprefix("torch.")
    tflops = peaks.get(kind, peaks.get("bfloat16") if kind == "float16" else None)
    return None if tflops is None else tflops * 1e12


def _card(name: str) -> str:
    return " ".join(word for word in re.split("[ -]", name.upper()) if not _SAYS_NOTHING_OF_SPEED.fullmatch(word))


def memory_bytes(device: torch.device) -> int | None:
    """The most memory the process has held on a CUDA device; None elsewhere."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


class MetricsLog:
    """A file of JSON lines, one event each, that a kill leaves with at most its last line torn.

    What a full disk has no room for is left out, and told of once: figures are not worth a run.

    Args:
        path: appended to; a torn last line of a killed run is cut off.
    """

    def __init__(self, path: Path) -> None:
        _cut_torn_line(path)
        self._path = path
        self._told = False
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def write(self, event: str, **values: Any) -> None:  # noqa: ANN401 - any JSON value
        """Append an event; numbers that are not finite become null, which JSON has."""
        line = json.dumps({"event": event} | {key: _finite(value) for key, value in values.items()}).encode() + b"\n"
        end = os.fstat(self._file).st_size
        try:
            while line:
                line = line[os.write(self._file, line) :]
        except OSError as error:
            os.ftruncate(self._file, end)  # half a line would spoil the next
            if not self._told:
                reason = f"{self._path} could not be written: {error.strerror}. The run goes on without its figures."
                warnings.warn(f"{reason} Free some space.", stacklevel=5)
            self._told = True
        else:
            self._told = False

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def past_eval_losses(path: Path, step: int) -> list[float]:
    """The losses a run's evaluations have found up to a step, as its file has them.

    Those after a step that the run later went back to are left out: they are of a course it has not taken.

    Args:
        path: a `MetricsLog`'s; none are found where there is no such file.
        step: where the run is.
    """
    losses: dict[int, float] = {}
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            event = json.loads(line)
        except ValueError:  # a disk that lost power may have left anything
            continue
        match event:
            case {"event": "begin" | "resume", "step": int(start)}:
                losses = {at: loss for at, loss in losses.items() if at <= start}
            case {"event": "evaluate", "step": int(at), "loss": float() | None as loss}:
                losses[at] = math.inf if loss is None else loss
    return [loss for at, loss in losses.items() if at <= step]


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cut_torn_line(path: Path) -> None:
    if not path.exists():
        return
    with path.open("rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
