"""Measure several implementations of the same task in one process, and print the results.

The throughput of a machine drifts by a few percent within minutes, and differs more between machines. Therefore the
implementations are interleaved: each runs a few steps per round. A speedup is the median over rounds of the ratio of
two measurements in the same round.
"""

import gc
import platform
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import ClassVar

import torch
from rich.console import Console
from rich.table import Table

from homebrew.errors import ConfigError
from homebrew.io import strict_json

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
GIB = 2**30


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if ON_GPU:
        torch.cuda.synchronize()


@dataclass
class StepTimer:
    """Measure the mean time of a step."""

    warmup: int
    """Number of steps that are not timed, at least 1."""
    steps: int
    """Number of timed steps after them, at least 1."""
    num_steps: int = 0
    started_at: float = 0.0
    """When the last step of the warm-up was complete, set by its `tick`."""
    seconds: float = 0.0
    """Mean seconds per step, set by the last `tick`."""
    now: ClassVar[Callable[[], float]] = perf_counter
    """Clock in seconds."""

    def __post_init__(self) -> None:
        if min(self.warmup, self.steps) < 1:
            raise ConfigError(f"{self.warmup} warm-up steps and {self.steps} timed steps: both must be at least 1.")

    def tick(self) -> bool:
        """Count a step. Return whether it was the last one."""
        self.num_steps += 1
        if self.num_steps == self.warmup:
            synchronize()
            self.started_at = StepTimer.now()
        elif self.num_steps == self.warmup + self.steps:
            synchronize()
            self.seconds = (StepTimer.now() - self.started_at) / self.steps
            return True
        return False


RunSteps = Callable[[StepTimer], None]
"""Runs training steps until the timer's `tick` returns True."""


@dataclass(frozen=True)
class Implementation:
    """An implementation to measure."""

    name: str
    build: Callable[[], RunSteps]
    """Load model and data. Not timed."""
    settings: str = ""
    """Settings, printed below the table."""


@dataclass
class Measurement:
    """Results of one implementation."""

    name: str
    seconds: list[float] = field(default_factory=list)
    """Mean seconds per step, one value per round."""
    settings: str = ""
    first_seconds: float = 0.0
    """Seconds to build and to run the first steps, including compilation."""
    peak_bytes: int | None = None
    """Peak GPU memory in bytes, without the memory of the other implementations."""


@dataclass
class RoundOptions:
    """Options of a script that measures implementations in rounds."""

    rounds: int = 5
    """Number of rounds. Each implementation runs once per round."""
    steps: int = 5
    """Timed steps per implementation and round."""
    warmup: int = 1
    """Steps before the timed ones."""
    json: Path | None = None
    """JSON file for tables and raw times."""


def measure_interleaved(implementations: Iterable[Implementation], options: RoundOptions) -> list[Measurement]:
    """Build all implementations, then run each for some steps per round. Every second round is in reverse order.

    An implementation other than the first that cannot be built (no memory, missing library) is skipped.

    Raises:
        ConfigError: The number of rounds is less than 1.
    """
    if options.rounds < 1:
        raise ConfigError(f"--rounds {options.rounds}: must be at least 1.")
    console = Console(stderr=True, highlight=False)
    loaded: list[tuple[Measurement, RunSteps, int]] = []
    for implementation in implementations:
        before, start = _allocated(), perf_counter()
        try:
            run_steps = implementation.build()
            run_steps(StepTimer(options.warmup, 2))  # compiles
        except (Exception, SystemExit) as error:
            if not loaded:
                raise
            console.print(f"{implementation.name} is skipped: {type(error).__name__}: {error}", style="bold red")
            continue
        gc.collect()
        measurement = Measurement(implementation.name, [], implementation.settings, perf_counter() - start)
        loaded.append((measurement, run_steps, _allocated() - before))
        console.print(f"{measurement.name}: ready after {measurement.first_seconds:.1f} s", style="dim")
    for turn in range(options.rounds):
        for measurement, run_steps, own_bytes in loaded if turn % 2 == 0 else loaded[::-1]:
            if ON_GPU:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            other_bytes = _allocated() - own_bytes
            timer = StepTimer(options.warmup, options.steps)
            run_steps(timer)
            measurement.seconds.append(timer.seconds)
            if ON_GPU:
                measurement.peak_bytes = torch.cuda.max_memory_allocated() - other_bytes
        done = ", ".join(f"{each.name} {format_number(1000 * each.seconds[-1])} ms" for each, *_ in loaded)
        console.print(f"round {turn + 1} of {options.rounds}: {done}", style="dim")
    return [measurement for measurement, *_ in loaded]


def _allocated() -> int:
    return torch.cuda.memory_allocated() if ON_GPU else 0


def speedup(homebrew: Measurement, other: Measurement) -> float:
    """Return how many times as fast as `other` homebrew is: the median over rounds."""
    return median(b / a for a, b in zip(homebrew.seconds, other.seconds, strict=True))


def measure_matmul_flops() -> float:
    """Measure the FLOP/s of a matrix product: 8192³ in bfloat16 on a GPU, 2048³ in float32 on a CPU."""
    size, dtype, count = (8192, torch.bfloat16, 10) if ON_GPU else (2048, torch.float32, 1)
    a, b = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
    out, times = torch.empty_like(a), []
    for _ in range(13):
        synchronize()
        start = StepTimer.now()
        for _ in range(count):
            torch.mm(a, b, out=out)
        synchronize()
        times.append(StepTimer.now() - start)
    return 2 * size**3 * count / median(times[3:])


def describe_machine() -> str:
    """Return the device and the versions of Python and PyTorch, in one line."""
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    if ON_GPU:
        return f"{torch.cuda.get_device_name()}, {versions}"
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else []
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads, {versions}"


@dataclass
class Report:
    """Tables that are printed at the end and, optionally, written to the file `json`."""

    json: Path | None = None
    metadata: dict[str, object] = field(default_factory=dict)
    tables: list[tuple[str, list[dict[str, str]]]] = field(default_factory=list)
    raw: list[object] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Check the folder of the file before anything is measured."""
        if self.json is not None and not self.json.absolute().parent.is_dir():
            raise ConfigError(f"{self.json} is in a folder that does not exist. Create the folder.")

    def add(self, title: str, rows: list[dict[str, str]]) -> None:
        """Add a table. All rows have the same columns."""
        self.tables.append((title, rows))

    def measure(
        self, title: str, implementations: list[Implementation], options: RoundOptions, *, tokens: int, flops: float = 0
    ) -> None:
        """Measure implementations, homebrew's first, with `tokens` per step, and add a table of throughputs.

        With the model's `flops` per token, the table has the MFU.
        """
        if flops:
            peak = measure_matmul_flops()
            self.metadata["matrix products"] = f"{peak / 1e12:.2f} TFLOP/s"
        measurements = measure_interleaved(implementations, options)
        rows = []
        for measurement in measurements:
            seconds = median(measurement.seconds)
            slow, fast = tokens / max(measurement.seconds), tokens / min(measurement.seconds)
            row = {
                "implementation": measurement.name,
                "tokens/s": format_number(tokens / seconds),
                "min–max": f"{format_number(slow)}–{format_number(fast)}",
                "ms per step": format_number(1000 * seconds),
                "speedup": f"{speedup(measurements[0], measurement):.3f} ×",
            }
            if flops:
                row["MFU"] = f"{flops * tokens / seconds / peak:.1%}"
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
