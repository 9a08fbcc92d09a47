"""Measure several implementations of the same task in one process, and print the results.

The throughput of a machine drifts by a few percent within minutes, and differs more between machines. So the
implementations are interleaved: each runs a few steps per round. A speedup is the median over rounds of the ratio of
two measurements in the same round.
"""

import gc
import platform
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import ClassVar

import torch
from rich.console import Console
from rich.table import Table

from homebrew.io import strict_json

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GIB = 2**30


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


class StepTimer:
    """Measure the mean time of a step, after some warm-up steps.

    Args:
        warmup: Number of steps that are not timed, at least 1.
        steps: Number of timed steps.
    """

    now: ClassVar[Callable[[], float]] = perf_counter
    """Clock in seconds."""

    def __init__(self, warmup: int, steps: int) -> None:
        self.warmup = warmup
        self.steps = steps
        self._steps_done = 0
        self.seconds = 0.0
        """Mean seconds per step, set by the last `tick`."""

    def tick(self) -> bool:
        """Count a step. Return whether it was the last one."""
        self._steps_done += 1
        if self._steps_done == self.warmup:
            synchronize()
            self._start = StepTimer.now()
        elif self._steps_done == self.warmup + self.steps:
            synchronize()
            self.seconds = (StepTimer.now() - self._start) / self.steps
            return True
        return False


def use_cpu_time() -> None:
    """Measure CPU time of a single thread instead of wall time, for a CPU that other processes use."""
    torch.set_num_threads(1)
    StepTimer.now = process_time


RunSteps = Callable[[StepTimer], None]
"""Runs training steps until the timer's `tick` returns True."""


@dataclass(frozen=True)
class Implementation:
    """An implementation to measure."""

    name: str
    build: Callable[[], RunSteps]
    """Load model and data. Not timed."""
    settings: str = ""
    """What the implementation runs with, printed below the table."""


@dataclass(frozen=True)
class Measurement:
    """Results of one implementation."""

    name: str
    seconds: list[float]
    """Mean seconds per step, one value per round."""
    peak_bytes: int | None
    """Peak GPU memory in bytes, without the memory of the other implementations."""
    first_seconds: float
    """Seconds to build and to run the first steps, including compilation."""
    settings: str = ""
    """What the implementation ran with."""

    @property
    def median(self) -> float:
        """Median of `seconds`."""
        return median(self.seconds)


def measure_interleaved(
    implementations: Iterable[Implementation], *, rounds: int, steps: int, warmup: int = 1
) -> list[Measurement]:
    """Build all implementations, then run each for some steps per round. Every second round is in reverse order.

    An implementation other than the first that cannot be built (no memory, missing library) is skipped.

    Args:
        implementations: What to compare.
        rounds: Number of rounds.
        steps: Timed steps per implementation and round.
        warmup: Steps before them that are not timed.
    """
    console = Console(stderr=True)
    loaded = []
    for implementation in implementations:
        before = _allocated()
        start = perf_counter()
        try:
            run_steps = implementation.build()
            run_steps(StepTimer(warmup, 2))  # compiles
        except (Exception, SystemExit) as error:
            if not loaded:
                raise
            console.print(f"{implementation.name} is skipped: {type(error).__name__}: {error}", style="bold red")
            continue
        gc.collect()
        loaded.append((implementation, run_steps, _allocated() - before, perf_counter() - start))
        console.print(f"{implementation.name}: ready after {loaded[-1][3]:.1f} s", style="dim")
    seconds: dict[str, list[float]] = {implementation.name: [] for implementation, *_ in loaded}
    peaks: dict[str, int] = {}
    for turn in range(rounds):
        for implementation, run_steps, own_bytes, _ in loaded if turn % 2 == 0 else loaded[::-1]:
            if DEVICE.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            other_bytes = _allocated() - own_bytes
            timer = StepTimer(warmup, steps)
            run_steps(timer)
            seconds[implementation.name].append(timer.seconds)
            if DEVICE.type == "cuda":
                peaks[implementation.name] = torch.cuda.max_memory_allocated() - other_bytes
        done = ", ".join(f"{name} {format_number(1000 * times[-1])} ms" for name, times in seconds.items())
        console.print(f"round {turn + 1} of {rounds}: {done}", style="dim", highlight=False)
    return [
        Measurement(each.name, seconds[each.name], peaks.get(each.name), first, each.settings)
        for each, *_, first in loaded
    ]


def _allocated() -> int:
    return torch.cuda.memory_allocated() if DEVICE.type == "cuda" else 0


def speedup(homebrew: Measurement, other: Measurement) -> float:
    """Return how many times as fast as `other` homebrew is: the median over rounds."""
    return median(b / a for a, b in zip(homebrew.seconds, other.seconds, strict=True))


def time_call(function: Callable[[], object], *, repeats: int = 10, warmup: int = 3) -> float:
    """Return the median seconds of a call, including the wait for the device."""
    times = []
    for _ in range(warmup + repeats):
        synchronize()
        start = StepTimer.now()
        function()
        synchronize()
        times.append(StepTimer.now() - start)
    return median(times[warmup:])


def measure_matmul_flops() -> float:
    """Measure the FLOP/s of a matrix product: 8192³ in bfloat16 on a GPU, 2048³ in float32 on a CPU."""
    size, dtype = (8192, torch.bfloat16) if DEVICE.type == "cuda" else (2048, torch.float32)
    a, b = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)

    def products() -> None:
        for _ in range(10 if DEVICE.type == "cuda" else 1):
            torch.mm(a, b, out=out)

    return 2 * size**3 * (10 if DEVICE.type == "cuda" else 1) / time_call(products)


def describe_machine() -> str:
    """Return the device and the versions of Python and PyTorch, in one line."""
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    if DEVICE.type == "cuda":
        return f"{torch.cuda.get_device_name()}, {versions}"
    clock = "CPU time of one thread" if StepTimer.now is process_time else f"{torch.get_num_threads()} threads"
    return f"{_cpu_name()}, {clock}, {versions}"


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@dataclass
class Report:
    """Tables that are printed at the end and, optionally, written as JSON.

    Args:
        json: Output file.
    """

    json: Path | None = None
    metadata: dict[str, object] = field(default_factory=dict)
    tables: list[tuple[str, list[dict[str, str]]]] = field(default_factory=list)
    raw: list[object] = field(default_factory=list)

    def add(self, title: str, rows: list[dict[str, str]]) -> None:
        """Add a table. All rows have the same columns."""
        self.tables.append((title, rows))

    def add_throughput(
        self,
        title: str,
        measurements: list[Measurement],
        *,
        per_step: float,
        unit: str = "tokens/s",
        flops_per_step: float | None = None,
        peak: float | None = None,
    ) -> None:
        """Add a table of throughputs. The first measurement is homebrew's.

        Args:
            title: Title of the table.
            measurements: One per implementation.
            per_step: Units processed per step.
            unit: Name of the throughput's unit.
            flops_per_step: The model's FLOPs per step, for MFU.
            peak: FLOP/s that correspond to an MFU of 1.
        """
        rows = []
        for measurement in measurements:
            slow, fast = per_step / max(measurement.seconds), per_step / min(measurement.seconds)
            row = {
                "implementation": measurement.name,
                unit: format_number(per_step / measurement.median),
                "min–max": f"{format_number(slow)}–{format_number(fast)}",
                "ms per step": format_number(1000 * measurement.median),
                "speedup": f"{speedup(measurements[0], measurement):.3f} ×",
            }
            if flops_per_step and peak:
                row["MFU"] = f"{flops_per_step / measurement.median / peak:.1%}"
            if measurement.peak_bytes is not None:
                row["peak GiB"] = f"{measurement.peak_bytes / GIB:.1f}"
            rows.append(row)
            self.raw.append({"table": title, **asdict(measurement)})
            if measurement.settings:
                self.metadata[measurement.name] = measurement.settings
        self.add(title, rows)

    def finish(self) -> None:
        """Print the tables and the machine, and write the JSON file."""
        console = Console(soft_wrap=True, width=150)
        self.metadata = {"machine": describe_machine(), **self.metadata}
        for title, rows in self.tables:
            table = Table(title=title, title_justify="left", title_style="bold")
            for index, column in enumerate(rows[0]):
                table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
            for row in rows:
                table.add_row(*row.values())
            console.print(table)
        for name, value in self.metadata.items():
            console.print(f"{name}: {value}", highlight=False)
        if self.json is not None:
            tables = [{"title": title, "rows": rows} for title, rows in self.tables]
            text = strict_json({"metadata": self.metadata, "tables": tables, "raw": self.raw}, indent=2, default=str)
            self.json.write_text(text + "\n", encoding="utf-8")


def format_number(value: float) -> str:
    """Format a number with three to four digits and thousands separators."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"
