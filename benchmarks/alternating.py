"""Runs the sides of a comparison in turns and reports what they did.

A machine's speed drifts by some per cent within minutes, and by more between machines. So each side takes a short
stretch of steps, then the next one does, again and again; a ratio is the median over rounds of two neighbouring
stretches.
"""

import gc
import json
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

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GIB = 2**30


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


class Clock:
    """Times the steps of a stretch after its first ones.

    Args:
        warmup: steps at the start that are not timed, at least 1.
        steps: steps that are.
    """

    timer: ClassVar[Callable[[], float]] = perf_counter
    """Where the seconds come from."""

    def __init__(self, warmup: int, steps: int) -> None:
        self.warmup = warmup
        self.steps = steps
        self._taken = 0
        self.seconds = 0.0
        """A step's, once the stretch is over."""

    def tick(self) -> bool:
        """Count a step; whether it was the last."""
        self._taken += 1
        if self._taken == self.warmup:
            synchronize()
            self._began = Clock.timer()
        elif self._taken == self.warmup + self.steps:
            synchronize()
            self.seconds = (Clock.timer() - self._began) / self.steps
            return True
        return False


def use_processor_time() -> None:
    """Count one thread's own time from here on, not the wall's: for a CPU that others use meanwhile."""
    torch.set_num_threads(1)
    Clock.timer = process_time


Stretch = Callable[[Clock], None]
"""Takes steps until the clock says that it was the last."""


@dataclass(frozen=True)
class Side:
    """One of those compared."""

    name: str
    build: Callable[[], Stretch]
    """Loads its model and data; not timed."""


@dataclass(frozen=True)
class Measured:
    """What a side did."""

    name: str
    seconds: list[float]
    """A step's, one of each round."""
    peak_bytes: int | None
    """The most it held on the GPU at once, without what belongs to the other sides."""
    first_seconds: float
    """Its first stretch, compilation included."""

    @property
    def median(self) -> float:
        """Of `seconds`."""
        return median(self.seconds)


def alternate(sides: Iterable[Side], *, rounds: int, steps: int, warmup: int = 1) -> list[Measured]:
    """Build all sides, then let each take `steps` steps a round, in turns; every other round backwards.

    A side other than the first that cannot be built, for want of memory or of a library, is left out.

    Args:
        sides: what to compare.
        rounds: stretches of each side.
        steps: timed steps in a stretch.
        warmup: steps before them that are not.
    """
    console = Console(stderr=True)
    loaded = []
    for side in sides:
        before = _allocated()
        began = perf_counter()
        try:
            stretch = side.build()
            stretch(Clock(warmup, 2))  # compiles
        except (Exception, SystemExit) as error:
            if not loaded:
                raise
            console.print(f"{side.name} is left out: {type(error).__name__}: {error}", style="bold red")
            continue
        gc.collect()
        loaded.append((side.name, stretch, _allocated() - before, perf_counter() - began))
        console.print(f"{side.name}: ready after {loaded[-1][3]:.1f} s", style="dim")
    seconds: dict[str, list[float]] = {name: [] for name, *_ in loaded}
    peaks: dict[str, int] = {}
    for turn in range(rounds):
        for name, stretch, own, _ in loaded if turn % 2 == 0 else loaded[::-1]:
            if DEVICE.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            others = _allocated() - own
            clock = Clock(warmup, steps)
            stretch(clock)
            seconds[name].append(clock.seconds)
            if DEVICE.type == "cuda":
                peaks[name] = torch.cuda.max_memory_allocated() - others
        done = ", ".join(f"{name} {number(1000 * seconds[name][-1])} ms" for name, *_ in loaded)
        console.print(f"round {turn + 1} of {rounds}: {done}", style="dim", highlight=False)
    return [Measured(name, seconds[name], peaks.get(name), first) for name, *_, first in loaded]


def _allocated() -> int:
    return torch.cuda.memory_allocated() if DEVICE.type == "cuda" else 0


def ratio(ours: Measured, other: Measured) -> float:
    """How many times as fast we are: the median over the rounds."""
    return median(theirs / own for own, theirs in zip(ours.seconds, other.seconds, strict=True))


def time_call(function: Callable[[], object], *, repeats: int = 10, warmup: int = 3) -> float:
    """Median seconds of a call, waiting for the device each time."""
    times = []
    for _ in range(warmup + repeats):
        synchronize()
        began = Clock.timer()
        function()
        synchronize()
        times.append(Clock.timer() - began)
    return median(times[warmup:])


def matmul_peak() -> float:
    """FLOP/s of a large square matrix product here and now: 8192³ in bfloat16 on a GPU, 2048³ in float32 elsewhere."""
    size, dtype = (8192, torch.bfloat16) if DEVICE.type == "cuda" else (2048, torch.float32)
    a, b = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)

    def products() -> None:
        for _ in range(10 if DEVICE.type == "cuda" else 1):
            torch.mm(a, b, out=out)

    return 2 * size**3 * (10 if DEVICE.type == "cuda" else 1) / time_call(products)


def machine() -> str:
    """The processor, the graphics card and the versions, in a line."""
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    if DEVICE.type == "cuda":
        return f"{torch.cuda.get_device_name()}, {versions}"
    clock = "processor time of one thread" if Clock.timer is process_time else f"{torch.get_num_threads()} threads"
    return f"{_processor()}, {clock}, {versions}"


def _processor() -> str:
    facts = Path("/proc/cpuinfo")
    if facts.exists():
        for line in facts.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@dataclass
class Report:
    """Tables, printed at the end and kept as JSON if asked for.

    Args:
        json: a file to write.
    """

    json: Path | None = None
    facts: dict[str, object] = field(default_factory=dict)
    tables: list[tuple[str, list[dict[str, str]]]] = field(default_factory=list)
    raw: list[object] = field(default_factory=list)

    def add(self, title: str, rows: list[dict[str, str]]) -> None:
        """A table whose rows all have the same columns."""
        self.tables.append((title, rows))

    def add_rates(
        self,
        title: str,
        measured: list[Measured],
        *,
        per_step: float,
        unit: str = "tokens/s",
        flops_per_step: float | None = None,
        peak: float | None = None,
    ) -> None:
        """The sides' speeds, the first being ours.

        Args:
            title: what was run.
            measured: the sides.
            per_step: units in a step.
            unit: what is counted.
            flops_per_step: of the model.
            peak: FLOP/s that `flops_per_step` is compared with.
        """
        rows = []
        for side in measured:
            slow, fast = per_step / max(side.seconds), per_step / min(side.seconds)
            row = {
                "side": side.name,
                unit: number(per_step / side.median),
                "slowest–fastest": f"{number(slow)}–{number(fast)}",
                "ms a step": number(1000 * side.median),
                "ours is": f"{ratio(measured[0], side):.3f} ×",
            }
            if flops_per_step and peak:
                row["MFU"] = f"{flops_per_step / side.median / peak:.1%}"
            if side.peak_bytes is not None:
                row["peak GiB"] = f"{side.peak_bytes / GIB:.1f}"
            rows.append(row)
            self.raw.append({"table": title, **asdict(side)})
        self.add(title, rows)

    def finish(self) -> None:
        """Print the tables and the machine; write the file."""
        console = Console(soft_wrap=True, width=150)
        self.facts = {"machine": machine(), **self.facts}
        for title, rows in self.tables:
            table = Table(title=title, title_justify="left", title_style="bold")
            for index, column in enumerate(rows[0]):
                table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
            for row in rows:
                table.add_row(*row.values())
            console.print(table)
        for name, fact in self.facts.items():
            console.print(f"{name}: {fact}", highlight=False)
        if self.json is not None:
            tables = [{"title": title, "rows": rows} for title, rows in self.tables]
            text = json.dumps({"facts": self.facts, "tables": tables, "raw": self.raw}, indent=2, default=str)
            self.json.write_text(text + "\n", encoding="utf-8")


def number(value: float) -> str:
    """Four digits' worth of a number, thousands separated."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"
