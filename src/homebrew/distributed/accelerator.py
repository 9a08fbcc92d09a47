"""Build or check the run's Accelerator, and check that the launch is one that homebrew supports."""

import atexit
import time
from datetime import timedelta
from pathlib import Path

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs, LoggerType, ProjectConfiguration

from homebrew.distributed.launch import check_launch, set_num_threads
from homebrew.distributed.precision import resolve_mixed_precision
from homebrew.errors import ConfigError, LaunchError

_GLOO_CLEANUP_SECONDS = 0.1


def build_accelerator(
    *,
    output_dir: str | Path = ".",
    mixed_precision: str = "auto",
    log_with: str | None = None,
    collective_timeout_seconds: float = 600.0,
) -> Accelerator:
    """Build an Accelerator from the launcher's settings, with homebrew's defaults for the rest.

    Args:
        output_dir: The run's output directory; trackers write to its `logs` subdirectory.
        mixed_precision: "auto", "no", "bf16" or "fp16".
        log_with: Name of an Accelerate tracker, "all", or None.
        collective_timeout_seconds: Timeout of each collective operation, in seconds.

    Raises:
        ConfigError: If this process already has an Accelerator with another precision, or the tracker is unavailable.
        LaunchError: If the launch is inconsistent or not supported, see `check_accelerator`.
    """
    if log_with is not None:
        _check_tracker(log_with)
    precision = resolve_mixed_precision(mixed_precision)  # raises before Accelerate fixes the precision
    try:
        accelerator = Accelerator(
            mixed_precision=precision,
            # The train step sets the number of accumulation steps, not a data loader.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=collective_timeout_seconds))],
            log_with=log_with,
            project_config=ProjectConfiguration(
                project_dir=str(output_dir), logging_dir=str(Path(output_dir) / "logs")
            ),
        )
    except ValueError as error:
        if "torch.distributed" in str(error):
            raise LaunchError(
                f"{error}. Start several processes with accelerate launch; for one process, unset LOCAL_RANK."
            ) from error
        if "already been initialized" not in str(error):
            raise
        raise ConfigError(
            f"mixed_precision={precision!r} differs from the precision of an earlier Trainer or Accelerator in this "
            f"process, {AcceleratorState().mixed_precision!r}, and Accelerate allows only one per process. Use the "
            f"same precision, or restart Python (in a notebook, the kernel)."
        ) from error
    check_launch(accelerator)
    set_num_threads(accelerator)
    _register_exit_delay(accelerator)
    return accelerator


def check_accelerator(
    accelerator: Accelerator, *, mixed_precision: str = "auto", log_with: str | None = None
) -> Accelerator:
    """Check that an Accelerator built by the user agrees with the config and the launch, and return it.

    The config's `mixed_precision` must be "auto" or equal to the Accelerator's, and its `log_with` must be None.

    Raises:
        ConfigError: If the config contradicts the Accelerator.
        LaunchError: If the number of processes is not the launcher's, or the launch uses an engine or precision that
            is not supported.
    """
    if mixed_precision not in ("auto", accelerator.mixed_precision):
        raise ConfigError(
            f"mixed_precision={mixed_precision!r}, but the given Accelerator has mixed_precision="
            f"{accelerator.mixed_precision!r}, which cannot be changed. Build it as Accelerator(mixed_precision="
            f"{mixed_precision!r}), and leave the config's mixed_precision at 'auto'."
        )
    if log_with is not None:
        raise ConfigError(
            f"log_with={log_with!r} has no effect on an Accelerator that is already built. Build it as "
            f"Accelerator(log_with={log_with!r}, project_dir=…), and leave the config's log_with at None."
        )
    check_launch(accelerator)
    _register_exit_delay(accelerator)
    return accelerator


def _register_exit_delay(accelerator: Accelerator) -> None:
    """Let gloo's threads release the tensors of the last collectives before Python exits.

    The threads need the interpreter for this, and abort the process if the interpreter is already shutting down
    (pytorch/pytorch#190489). A collective cannot be used to wait for the threads: after an error the other ranks may be
    gone.
    """
    if accelerator.num_processes > 1:
        atexit.unregister(_sleep_before_exit)  # registered once, however many Accelerators are built
        atexit.register(_sleep_before_exit)


def _sleep_before_exit() -> None:
    time.sleep(_GLOO_CLEANUP_SECONDS)


def _check_tracker(name: str) -> None:
    """Raise ConfigError for a tracker that Accelerate does not support, or would silently skip if not installed."""
    supported, installed = LoggerType.list(), [str(tracker) for tracker in get_available_trackers()]
    available = installed + [custom for custom in LOGGER_TYPE_TO_CLASS if custom not in supported]
    if name in available or (name == "all" and installed):
        return
    if not isinstance(name, str):
        reason = "must be the name of one tracker, or 'all'. For several, pass a custom Accelerator with its trackers"
    elif name == "all":
        reason = "no tracker is installed. Run for example `pip install tensorboard`"
    elif name in supported:
        reason = f"the tracker is not installed. Run `pip install {name}`"
    else:
        reason = f"Accelerate has no such tracker. Choose one of {', '.join(supported)}"
    raise ConfigError(f"log_with={name!r}: {reason}. Available: {', '.join(available) or 'none'}.")
