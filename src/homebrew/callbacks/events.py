"""Emits training events: calls a method of every callback, in the order of the Trainer's list."""

from typing import TYPE_CHECKING

from homebrew.callbacks.base import Callback
from homebrew.errors import ConfigError
from homebrew.user_warnings import warn

if TYPE_CHECKING:
    from homebrew.training.trainer import Trainer


def emit(trainer: "Trainer", event: str, *arguments: object) -> None:
    """Call the method `event` of every callback with the trainer and `arguments`."""
    for callback in trainer.callbacks:
        _call(callback, event, trainer, *arguments)


def emit_train_end(trainer: "Trainer", error: BaseException | None) -> None:
    """Call every `on_train_end`, even if one raises. Raise the first error, unless `error` has ended the run."""
    first = error
    for callback in trainer.callbacks:
        try:
            _call(callback, "on_train_end", trainer)
        except Exception as raised:
            if first is None:
                first = raised
            else:
                warn(f"{type(callback).__name__}.on_train_end also failed: {raised!r}")
    if first is not None and first is not error:
        raise first


def _call(callback: Callback, event: str, *arguments: object) -> None:
    # In some libraries, a callback stops the run by what it returns. Ignoring the value would train to max_steps.
    if (value := getattr(callback, event)(*arguments)) is not None:
        raise ConfigError(
            f"{type(callback).__name__}.{event} returned {value!r:.100}, but the results of callbacks are not used. "
            f"Return nothing; to stop the run, set trainer.should_stop = True."
        )
