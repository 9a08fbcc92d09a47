"""`CurvePlot`: writes the curves of a run as `curves.png`."""

import importlib.util
import time
from pathlib import Path
from typing import TYPE_CHECKING

from homebrew.callbacks.base import Callback
from homebrew.io import atomic_replace, remove_leftovers
from homebrew.metrics.step_metrics import EvalMetrics, StepMetrics
from homebrew.user_warnings import warn

if TYPE_CHECKING:
    from homebrew.training.trainer import Trainer


class CurvePlot(Callback):
    """Writes `curves.png` into `output_dir` at the end of a run, if matplotlib is installed.

    It is one of the Trainer's built-in callbacks. No image is written for a run that is interrupted or fails; use
    `homebrew plot`. An image that cannot be written causes a warning.

    Args:
        min_seconds: The shortest run, in seconds, for which an image is written, since drawing takes about a second.
            An existing image is always updated. Use `math.inf` to write none.
    """

    def __init__(self, min_seconds: float = 10.0) -> None:
        self.min_seconds = min_seconds
        self._has_new_metrics = False
        self._started_at = 0.0

    def on_train_begin(self, trainer: "Trainer") -> None:
        """Record when the run starts."""
        self._started_at, self._has_new_metrics = time.monotonic(), False
        if trainer.is_main_process:
            remove_leftovers(Path(trainer.config.output_dir) / "curves.png")

    def on_log(self, trainer: "Trainer", metrics: StepMetrics) -> None:
        """Record that the curves are longer."""
        self._has_new_metrics = True

    def on_evaluate(self, trainer: "Trainer", metrics: EvalMetrics) -> None:
        """Record that the curves are longer."""
        self._has_new_metrics = True

    def on_train_end(self, trainer: "Trainer") -> None:
        """Draw the picture."""
        has_new_metrics, self._has_new_metrics = self._has_new_metrics, False
        has_ended = trainer.step >= trainer.config.max_steps or trainer.should_stop
        if not (trainer.is_main_process and has_new_metrics and has_ended):
            return
        path = Path(trainer.config.output_dir) / "curves.png"
        is_long = time.monotonic() - self._started_at >= self.min_seconds
        if not (is_long or path.exists()) or importlib.util.find_spec("matplotlib") is None:
            return
        try:
            from homebrew.plotting.curves import curves_image
            from homebrew.plotting.run_record import read_run

            with atomic_replace(path) as temporary:
                temporary.write_bytes(curves_image([read_run(path.parent)]))
        except Exception as error:  # a picture is not worth a run, whatever is wrong with matplotlib
            warn(f"{path} could not be written: {error}. The run itself is complete.")
