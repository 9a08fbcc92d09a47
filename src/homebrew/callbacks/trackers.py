"""Accelerate's trackers: start them for a run, and send texts to them."""

import html
import os
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator

from homebrew.errors import ConfigError
from homebrew.metrics.run_settings import flatten_settings
from homebrew.metrics.step_metrics import TextSample
from homebrew.user_warnings import warn

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker


def start_trackers(
    accelerator: Accelerator, description: dict[str, Any], *, name: str, step: int
) -> "list[GeneralTracker]":
    """Start the Accelerator's trackers, and return them.

    A resumed run continues in the tracker: as the same run of Weights & Biases and trackio, and in TensorBoard without
    the steps that it takes again.

    Args:
        accelerator: Accelerator with the trackers. It starts them on rank 0 only.
        description: Contents of `run.json`.
        name: Name of the run.
        step: Step at which the run starts or resumes.

    Raises:
        ConfigError: A tracker cannot be started.
    """
    run_id = description["run_id"]
    project = "homebrew"
    if "wandb" in map(str, accelerator.log_with):
        project = os.environ.get("WANDB_PROJECT", project)  # the arguments of wandb.init override its variables
    options = {
        "tensorboard": {"purge_step": step + 1},
        "trackio": {"name": f"{name}-{run_id}", "resume": "allow"},  # resumes by name
        "wandb": {
            "name": os.environ.get("WANDB_NAME", name),
            "id": os.environ.get("WANDB_RUN_ID", run_id),
            "resume": os.environ.get("WANDB_RESUME", "allow"),
        },
    }
    try:
        accelerator.init_trackers(project, config=flatten_settings(description), init_kwargs=options)
    except BaseException as error:
        names = ", ".join(tracker.name for tracker in accelerator.trackers)
        accelerator.trackers = []  # otherwise the next run would treat half-started trackers as running
        if isinstance(error, Exception):
            problem = traceback.format_exception_only(error)[0].strip()
            raise ConfigError(
                f"log_with: {names} could not be started: {problem.rstrip('.'):.500}. "
                f"Correct the settings of the tracker or log in (Weights & Biases: `wandb login`, or "
                f"WANDB_MODE=offline), or remove log_with."
            ) from error
        raise
    return list(accelerator.trackers)


def finish_trackers(trackers: "Iterable[GeneralTracker]") -> None:
    """Finish trackers. One that fails, such as without a network, is a warning: the run itself is complete."""
    for tracker in trackers:
        try:
            tracker.finish()
        except Exception as error:  # of the tracker's library
            warn(f"log_with: {tracker.name} could not be finished: {error!r:.500}. All metrics are in metrics.jsonl.")


def log_samples(trackers: "Iterable[GeneralTracker]", samples: Sequence[TextSample], step: int) -> None:
    """Send texts to the trackers that show them, as `samples/0`, `samples/1`, … in the order of the prompts."""
    for tracker in trackers:
        show = _TEXT_OF.get(tracker.name)
        if show is not None:
            tracker.log({f"samples/{index}": show(sample.text) for index, sample in enumerate(samples)}, step=step)


def _markdown(text: str) -> str:
    """Return Markdown that shows a text as it is."""
    return "".join(f"    {line}\n" for line in text.splitlines())


def _trackio_markdown(text: str) -> object:
    import trackio

    return trackio.Markdown(_markdown(text))


def _wandb_html(text: str) -> object:
    """Return a page, because Weights & Biases shows only the last of several strings."""
    import wandb

    return wandb.Html(f'<pre style="white-space: pre-wrap">{html.escape(text)}</pre>')


_TEXT_OF: dict[str, Callable[[str], object]] = {
    "comet_ml": str,
    "tensorboard": _markdown,
    "trackio": _trackio_markdown,
    "wandb": _wandb_html,
}
"""How a tracker takes a text; the trackers that are not here ignore texts or fail."""
