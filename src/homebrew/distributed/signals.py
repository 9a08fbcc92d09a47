"""Stop requests from outside: what a signal asks of a run, without breaking into a step."""

import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Self

import torch
from accelerate import Accelerator
from torch import Tensor

HANDLED_SIGNALS = tuple(signal.Signals[n] for n in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, n))
"""SIGUSR1: save and go on; the others: save and leave. SIGHUP comes when a terminal is closed."""


class SignalHandler:
    """Remembers signals while it is entered; the run asks for them between steps.

    A second SIGINT raises KeyboardInterrupt at once. Outside the main thread, where Python allows no handlers, it
    watches nothing.
    """

    def __init__(self) -> None:
        self._received: set[signal.Signals] = set()
        self._interrupted = False
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {n: signal.signal(n, self._receive) for n in HANDLED_SIGNALS if not _is_nohup(n)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous = {}

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        received = signal.Signals(number)
        if received is signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
        self._received.add(received)

    def take(self) -> list[float]:
        """1 for each of `HANDLED_SIGNALS` that has come since the last call, else 0."""
        received, self._received = self._received, set()
        return [float(number in received) for number in HANDLED_SIGNALS]


def _is_nohup(number: signal.Signals) -> bool:
    """Whether this is a SIGHUP that the process was told to ignore; a SIGINT is ignored by every shell's `&`."""
    return number.name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN


class FlagExchange:
    """What any process asks of all, agreed on without making the device or each other wait.

    With several processes the answer is the one sent a call earlier: its sum has long arrived, and every process
    reads the same one at the same step.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._sent: tuple[Tensor, torch.cuda.Event | None] | None = None

    def exchange(self, flags: list[float]) -> list[bool]:
        """Send this process's flags; learn which of them any process has set.

        Args:
            flags: 0 or 1 each, the same number of them at every call and on every process.
        """
        if self._accelerator.num_processes == 1:
            return [flag > 0 for flag in flags]
        arrived = [0.0] * len(flags)
        if self._sent is not None:
            sums, event = self._sent
            if event is not None:
                event.synchronize()
            arrived = sums.tolist()
        sums = self._accelerator.reduce(torch.tensor(flags).to(self._accelerator.device, non_blocking=True), "sum")
        event = None
        if sums.is_cuda:
            sums, event = sums.to("cpu", non_blocking=True), torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        self._sent = (sums, event)
        return [value > 0 for value in arrived]


def ends(number: signal.Signals) -> bool:
    """Whether a run is over that has saved for this signal."""
    return number.name != "SIGUSR1"


def leave(number: signal.Signals) -> None:
    """End as the signal asks, after the save: in a notebook by KeyboardInterrupt, else with exit code 128 + n.

    Raises:
        KeyboardInterrupt: in an interactive session.
        SystemExit: elsewhere.
    """
    if hasattr(sys, "ps1") or "ipykernel" in sys.modules:
        raise KeyboardInterrupt(f"stopped by {number.name} after saving")
    raise SystemExit(128 + number)
