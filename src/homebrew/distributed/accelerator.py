"""The Accelerator of a run, and the check that the launcher got the processes it asked for."""

import atexit
import os
import time
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import (
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    LoggerType,
    ParallelismConfig,
    ProjectConfiguration,
    parse_flag_from_env,
)

from homebrew.errors import ConfigError, LaunchError

_SETTLE_SECONDS = 0.1
_NOT_OURS = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA)


def build_accelerator(
    *,
    output_dir: str | Path = ".",
    mixed_precision: str = "auto",
    log_with: str | None = None,
    collective_timeout_seconds: float = 600.0,
) -> Accelerator:
    """Build an Accelerator from the launcher's settings, with homebrew's defaults for the rest.

    Args:
        output_dir: The run's folder; trackers write to `logs` in it.
        mixed_precision: "auto", "no", "bf16" or "fp16".
        log_with: Name of an Accelerate tracker, "all", or None.
        collective_timeout_seconds: Timeout of each collective operation, in seconds.

    Raises:
        ConfigError: an earlier Accelerator of the process has another precision, or the tracker is not there.
        LaunchError: the launcher started several processes and Accelerate sees one, or the like.
    """
    _check_parallelism()
    if log_with is not None:
        _check_tracker(log_with)
    precision = _mixed_precision(mixed_precision)
    if _on_cpu():
        _check_precision(precision, "cpu")  # before Accelerate keeps it for the process
    try:
        accelerator = Accelerator(
            mixed_precision=precision,
            # The window of accumulation is the step's own, not a loader's.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=collective_timeout_seconds))],
            log_with=log_with,
            project_config=ProjectConfiguration(
                project_dir=str(output_dir), logging_dir=str(Path(output_dir) / "logs")
            ),
        )
    except ValueError as error:
        if "already been initialized" not in str(error):
            raise
        raise ConfigError(
            f"mixed_precision={mixed_precision!r} is not what an earlier Trainer or Accelerator of this process "
            f"chose, and Accelerate keeps one for all. Use that one's, or restart Python (in a notebook, the kernel)."
        ) from error
    check_world(accelerator)
    _share_cores(accelerator)
    return accelerator


def check_accelerator(
    accelerator: Accelerator, *, mixed_precision: str = "auto", log_with: str | None = None
) -> Accelerator:
    """Check that an Accelerator built by the user agrees with the config, and return it.

    Args:
        accelerator: The user's Accelerator.
        mixed_precision: The config's; "auto" or the Accelerator's own.
        log_with: The config's; must be None.

    Raises:
        ConfigError: the config asks for others.
        LaunchError: as for one of ours.
    """
    if mixed_precision not in ("auto", accelerator.mixed_precision):
        raise ConfigError(
            f"mixed_precision={mixed_precision!r}, but the Accelerator you give has mixed_precision="
            f"{accelerator.mixed_precision!r}, and keeps it. Build it as Accelerator(mixed_precision="
            f"{mixed_precision!r}), and leave the config's at 'auto'."
        )
    if log_with is not None:
        raise ConfigError(
            f"log_with={log_with!r} is for an Accelerator of the Trainer's. Yours has trackers of its own: "
            f"build it as Accelerator(log_with={log_with!r}, project_dir=…), and leave the config's out."
        )
    check_world(accelerator)
    return accelerator


def _check_tracker(name: str) -> None:
    """Refuse a tracker that Accelerate does not know, or would leave out in silence."""
    known, installed = LoggerType.list(), [str(tracker) for tracker in get_available_trackers()]
    usable = installed + [own for own in LOGGER_TYPE_TO_CLASS if own not in known]  # which users have registered
    if name in usable or (name == "all" and installed):
        return
    if name == "all":
        reason = "none is installed. Run `pip install tensorboard`, for one"
    elif name in known:
        reason = f"it is not installed. Run `pip install {name}`"
    else:
        reason = f"Accelerate knows no such tracker. Choose one of {', '.join(known)}"
    raise ConfigError(f"log_with={name!r}: {reason}. Ready for use: {', '.join(usable) or 'none'}.")


def _check_parallelism() -> None:
    """Refuse sizes that do not make up the world; Accelerate's own error names neither."""
    if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG") != "true":
        return
    sizes, world = ParallelismConfig(), int(os.environ.get("WORLD_SIZE", "1"))
    if sizes.total_size != world:
        raise LaunchError(
            f"The launcher's parallelism_config is for {sizes.dp_replicate_size} × {sizes.dp_shard_size} processes "
            f"(dp_replicate_size × dp_shard_size), but it started {world}. Set the sizes so that their product is "
            f"num_processes."
        )


def _mixed_precision(wanted: str) -> str | None:
    """Accelerate's argument: None leaves the choice to the launcher."""
    if wanted != "auto":
        return wanted
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        return None
    return "bf16" if has_native_bf16() else None


def has_native_bf16() -> bool:
    """Whether the device has instructions for products of bfloat16, and does not emulate them."""
    if _on_cpu():
        return bool(torch.cpu._is_avx512_bf16_supported())
    return torch.cuda.is_available() and bool(torch.cuda.is_bf16_supported(including_emulation=False))


def _on_cpu() -> bool:
    """Whether a run is there: it has nothing else, or Accelerate was told to leave that alone."""
    return not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")


def _check_precision(precision: str | None, device: str) -> None:
    if precision == "fp8" or (precision, device) == ("fp16", "cpu"):
        raise LaunchError(
            f"mixed_precision={precision!r} cannot be used on {device} (Accelerate would run float32 in its place). "
            f"Choose 'bf16' or 'no'."
        )


def _share_cores(accelerator: Accelerator) -> None:
    """Use all cores: `accelerate launch` sets one thread a process where nobody asked for a number."""
    if accelerator.device.type == "cpu" and _accelerate_launched() and os.environ.get("OMP_NUM_THREADS") == "1":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def check_world(accelerator: Accelerator) -> None:
    """Refuse a world that is not the one the launcher asked for, of which Accelerate says nothing; see to its end.

    Raises:
        LaunchError: the numbers of processes differ, or what was asked for is not there.
    """
    asked, got = int(os.environ.get("WORLD_SIZE", "1")), accelerator.num_processes
    if asked != got:
        raise LaunchError(
            f"The launcher started {asked} processes, but Accelerate sees {got}: each would train alone and "
            f"overwrite the others. To run several processes on CPUs, set ACCELERATE_USE_CPU=true and launch with "
            f"--multi_gpu --num_processes {asked}; on GPUs, check that PyTorch sees them."
        )
    # Accelerate's single-process launcher names a rendezvous, but no world, when it was asked for several.
    if got == 1 and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ and _accelerate_launched():
        raise LaunchError(
            "`accelerate launch` was asked for several processes but starts one (it does so with --cpu, and with "
            "distributed_type MULTI_CPU). Set ACCELERATE_USE_CPU=true and launch with --multi_gpu instead, or ask "
            "for --num_processes 1."
        )
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and accelerator.distributed_type != DistributedType.FSDP:
        raise LaunchError(
            f"The launcher asked for FSDP, but Accelerate runs {accelerator.distributed_type.value} (it does so "
            f"without a GPU). Launch without FSDP, or on GPUs."
        )
    if accelerator.parallelism_config is not None and accelerator.distributed_type != DistributedType.FSDP:
        raise LaunchError(
            "The launcher's parallelism_config is for FSDP, which this launch does not use: without it every process "
            "has the whole model. Leave it out, or launch with FSDP."
        )
    if accelerator.distributed_type in _NOT_OURS:
        raise LaunchError(
            f"The launcher chose {accelerator.distributed_type.value}, which homebrew does not run on. Launch with "
            f"distributed_type MULTI_GPU (DDP) or FSDP; for more memory a process, FSDP is the one."
        )
    _check_precision(accelerator.mixed_precision, accelerator.device.type)
    if got > 1:
        atexit.unregister(_leave_world)
        atexit.register(_leave_world)


def _leave_world() -> None:
    """Before Python ends, let gloo's threads drop the tensors of the last collectives.

    They need the interpreter for it, and abort the process where they find that ending (pytorch/pytorch#190489). No
    collective may tell when they are done: at an error the others are not there to answer.
    """
    time.sleep(_SETTLE_SECONDS)


def _accelerate_launched() -> bool:
    return "ACCELERATE_MIXED_PRECISION" in os.environ
