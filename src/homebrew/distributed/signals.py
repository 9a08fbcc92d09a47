"""Handle SIGTERM, SIGINT, SIGHUP and SIGUSR1 between training steps."""

import contextlib
import multiprocessing
import os
import select
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Self

HANDLED_SIGNALS = tuple(signal.Signals[n] for n in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, n))
"""Signals that save a checkpoint; all but SIGUSR1 then end the run. SIGHUP is sent when a terminal is closed."""


class SignalHandler:
    """Context manager that records signals, for the training loop to handle between steps.

    If a stop signal has not been handled when the block ends, it takes effect then, unless an error ended the block.
    A second SIGINT raises KeyboardInterrupt immediately; in a process forked by `notebook_launcher`, the third SIGINT
    does. Outside the main thread, where Python does not allow signal handlers, no signal is recorded.

    Args:
        announce: Whether to print what the first SIGINT does.
    """

    def __init__(self, *, announce: bool = False) -> None:
        self._announce = announce
        self._received: set[signal.Signals] = set()
        self._num_interrupts = 0
        self._previous_handlers: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous_handlers = {n: signal.signal(n, self._record) for n in HANDLED_SIGNALS if not _is_nohup(n)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous_handlers = {}
        if error is None:
            for number in filter(ends_run, HANDLED_SIGNALS):
                if number in self._received:
                    exit_for_signal(number)

    def _record(self, number: int, _frame: FrameType | None) -> None:
        received = signal.Signals(number)
        if received is signal.SIGINT:
            self._num_interrupts += 1
            if self._num_interrupts > _signals_per_interrupt():
                raise KeyboardInterrupt
            if self._announce and self._num_interrupts == 1:
                _announce_interrupt()
        self._received.add(received)

    def pop_flags(self) -> list[float]:
        """Return 1 for each of `HANDLED_SIGNALS` received since the last call, else 0."""
        received, self._received = self._received, set()
        return [float(number in received) for number in HANDLED_SIGNALS]


def _is_nohup(number: signal.Signals) -> bool:
    """Return whether `nohup` made the process ignore this signal.

    Only SIGHUP is checked. SIGINT is handled even if it is ignored: shells ignore it for every background job.
    """
    return number.name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN


def _signals_per_interrupt() -> int:
    """Return how often a process receives SIGINT when the user interrupts the run once.

    A notebook sends SIGINT to its process group. If `notebook_launcher` has forked the process, PyTorch's elastic
    launcher then sends it again. The processes of `torchrun` and `accelerate launch` have their own process groups.
    """
    is_forked = multiprocessing.parent_process() is not None
    return 2 if is_forked and "TORCHELASTIC_RUN_ID" in os.environ else 1


def _announce_interrupt() -> None:
    """Print what SIGINT does. This runs in a signal handler: it uses no locks or buffers, and must not block."""
    message = "Ctrl-C: saving after this step, then exiting. Press Ctrl-C again to exit without saving.\n"
    if _is_interactive() and "ipykernel" in sys.modules:
        message = "Interrupted: saving after this step, then stopping. Interrupt again to stop without saving.\n"
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # RuntimeError: the signal interrupted another print
        if _is_interactive():
            print(message, end="", file=sys.stderr)  # a notebook's standard error is not a descriptor
        elif sys.stderr is not None and select.select([], [sys.stderr.fileno()], [], 0)[1]:
            start = "\n" if sys.stderr.isatty() else ""  # the terminal has echoed ^C
            os.write(sys.stderr.fileno(), (start + message).encode())


def ends_run(number: signal.Signals) -> bool:
    """Return whether the run ends after saving for this signal."""
    return number.name != "SIGUSR1"


def exit_for_signal(number: signal.Signals) -> None:
    """End the process for this signal, after the run has saved.

    Raises:
        KeyboardInterrupt: In a notebook or an interactive session.
        SystemExit: Elsewhere, with exit code 128 + signal number.
    """
    if _is_interactive():
        raise KeyboardInterrupt(f"stopped by {number.name} after saving")
    raise SystemExit(128 + number)


def _is_interactive() -> bool:
    return hasattr(sys, "ps1")  # IPython sets it as well, also in a notebook
