"""`Callback`: the base class of everything that receives training events."""

import difflib
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from homebrew.errors import ConfigError
from homebrew.metrics.step_metrics import EvalMetrics, SkippedStep, StepMetrics, TextSample

if TYPE_CHECKING:
    from homebrew.training.trainer import Trainer


class Callback:
    """Base class for callbacks. Every event method does nothing by default.

    Every event is called on every rank, for each callback in the order of the list. Metrics are the same on all
    ranks. Check `trainer.is_main_process` before printing or writing files. Methods that communicate between ranks,
    such as `trainer.evaluate()`, `trainer.paused()`, `trainer.save()` and `trainer.full_model()`, must be called on all
    ranks or on none.

    A callback may read any public attribute of the trainer. To stop the run, set `trainer.should_stop = True` on any
    rank: all ranks stop at the same step, at the latest one step later. Do not set the learning rate here, because the
    schedule sets it before every step: pass `Trainer(..., schedule=...)` instead. An exception raised in a callback
    ends the run.

    Raises:
        ConfigError: A subclass has a method whose name begins with "on_" but is not an event, or whose arguments
            differ from those of the event.
    """

    def __init_subclass__(cls, **options: Any) -> None:  # noqa: ANN401 - as in `object`
        """Check the names and arguments of the events' methods."""
        super().__init_subclass__(**options)
        events = {name: method for name, method in vars(Callback).items() if name.startswith("on_")}
        for name, method in vars(cls).items():
            if not name.startswith("on_") or not inspect.isfunction(method):
                continue
            if name not in events:
                similar = difflib.get_close_matches(name, events, n=1)
                advice = f"Did you mean {similar[0]}?" if similar else f"The events are {', '.join(events)}."
                raise ConfigError(f"{cls.__name__} has {name}, which is not an event of Callback. {advice}")
            arguments = list(inspect.signature(events[name]).parameters)
            try:
                inspect.signature(method).bind(*arguments)
            except TypeError:
                raise ConfigError(
                    f"{cls.__name__}.{name} does not take the arguments of the event. Define it as "
                    f"{name}({', '.join(arguments)})."
                ) from None

    def on_init_end(self, trainer: "Trainer") -> None:
        """Called once, at the end of the trainer's construction.

        Raise a `ConfigError` here if the trainer lacks what the callback needs, such as an `eval_dataset`.
        """

    def on_train_begin(self, trainer: "Trainer") -> None:
        """Called once, after the checkpoint is restored and before the first step.

        `trainer.step` is 0, or the step from which the run resumes.
        """

    def on_step_end(self, trainer: "Trainer") -> None:
        """Called after every optimizer step.

        On a GPU the step may still be running. Reading a tensor here makes the CPU wait for the GPU.
        """

    def on_log(self, trainer: "Trainer", metrics: StepMetrics) -> None:
        """Called with the metrics of the first, every `TrainerConfig.log_every`-th and the last step.

        Logging lags by one step, to avoid waiting for the GPU: use `metrics.step`, because `trainer.step` may be one
        step further.
        """

    def on_evaluate(self, trainer: "Trainer", metrics: EvalMetrics) -> None:
        """Called after the trainer has evaluated `eval_dataset`, every `TrainerConfig.eval_every` steps and at the end.

        A call to `trainer.evaluate()` does not trigger this event.
        """

    def on_save(self, trainer: "Trainer", path: Path) -> None:
        """Called when a checkpoint of `trainer.step` has been handed to the asynchronous writer.

        The directory `path` appears once the checkpoint is complete.
        """

    def on_step_skipped(self, trainer: "Trainer", steps: Sequence[SkippedStep]) -> None:
        """Called with the steps whose updates were not applied since the previous call.

        Skipped steps are detected at the next log, evaluation or save. This event comes before any `NonFiniteError`
        that they cause.
        """

    def on_sample(self, trainer: "Trainer", samples: Sequence[TextSample]) -> None:
        """Called with the texts that `SampleText` has generated at `trainer.step`, one for each prompt."""

    def on_train_end(self, trainer: "Trainer") -> None:
        """Called once when training ends, also after an exception or a signal.

        If an `on_train_begin` raised, this is called for all callbacks, including those whose `on_train_begin` was
        not called.
        """
