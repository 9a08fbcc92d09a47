"""Requests to save or stop a run, from any rank."""

from signal import Signals
from typing import TYPE_CHECKING

from accelerate import Accelerator

from homebrew.checkpoint.manager import CheckpointManager
from homebrew.distributed.collectives import FlagExchange
from homebrew.distributed.signals import HANDLED_SIGNALS, SignalHandler, ends_run, exit_for_signal

if TYPE_CHECKING:
    from homebrew.training.trainer import Trainer


class RunRequests:
    """Handles signals, `should_stop` and failed writes of any rank, on all ranks at the same step.

    Args:
        accelerator: The run's Accelerator.
        signals: Records this rank's signals.
        checkpoints: Writes the run's checkpoints.
    """

    def __init__(self, accelerator: Accelerator, signals: SignalHandler, checkpoints: CheckpointManager) -> None:
        self._flags = FlagExchange(accelerator)
        self._signals = signals
        self._checkpoints = checkpoints
        self._received: set[Signals] = set()
        self.stop_agreed = False
        """Whether all ranks know that the run must end. With several ranks, a step later than `should_stop`."""

    def handle(self, trainer: "Trainer") -> None:
        """Exchange the ranks' requests and act on them; collective.

        Raises:
            CheckpointError: On every rank, if a checkpoint could not be written.
            NonFiniteError: On every rank, if a checkpoint was not written because of a value that is not finite.
            SystemExit: After saving, for a signal that ends the run. In a notebook: KeyboardInterrupt.
        """
        writer_failed = self._exchange(should_stop=bool(trainer.should_stop))
        trainer.should_stop = trainer.should_stop or self.stop_agreed  # for the user to read, on every rank
        if writer_failed:
            self._checkpoints.wait()  # raises the error, on every rank
        received, self._received = self._received, set()
        for number in sorted(received, key=HANDLED_SIGNALS.index):
            trainer.save()
            if ends_run(number):
                self._checkpoints.wait()
                exit_for_signal(number)

    def has_stop_signal(self) -> bool:
        """Exchange the ranks' requests, and return whether `handle` will end the run for a signal; collective."""
        self._exchange(should_stop=False)
        return any(map(ends_run, self._received))

    def _exchange(self, *, should_stop: bool) -> bool:
        """Note the requests of all ranks, and return whether a checkpoint could not be written; collective."""
        own = [*self._signals.pop_flags(), float(should_stop), float(self._checkpoints.failed)]
        *received, stop, writer_failed = self._flags.exchange(own)
        self._received.update(number for number, flag in zip(HANDLED_SIGNALS, received, strict=True) if flag)
        self.stop_agreed = self.stop_agreed or stop
        return writer_failed

    def handle_last(self, trainer: "Trainer") -> None:
        """Handle requests at the end of the run; with several ranks, flags arrive one exchange later; collective."""
        for _ in range(2):
            self.handle(trainer)
