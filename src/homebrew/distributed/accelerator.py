"""Build or check the run's Accelerator, and check that the launch is one that homebrew supports."""

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

_GLOO_CLEANUP_SECONDS = 0.1
_UNSUPPORTED = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA)


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
    _check_parallelism_sizes()
    if log_with is not None:
        _check_tracker(log_with)
    precision = _resolve_mixed_precision(mixed_precision)
    if _uses_cpu():
        _check_precision(precision, "cpu")  # before Accelerate fixes the precision for this process
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
        if "already been initialized" not in str(error):
            raise
        raise ConfigError(
            f"mixed_precision={mixed_precision!r} differs from the precision of an earlier Trainer or Accelerator in "
            f"this process, and Accelerate allows only one per process. Use the same precision, or restart Python (in "
            f"a notebook, the kernel)."
        ) from error
    _check_launch(accelerator)
    _set_num_threads(accelerator)
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
    _check_launch(accelerator)
    _register_exit_delay(accelerator)
    return accelerator


def has_native_bf16() -> bool:
    """Return whether the device multiplies bfloat16 matrices natively, without emulation."""
    if _uses_cpu():
        return bool(torch.cpu._is_avx512_bf16_supported())
    return torch.cuda.is_available() and bool(torch.cuda.is_bf16_supported(including_emulation=False))


def _resolve_mixed_precision(requested: str) -> str | None:
    """Return Accelerate's `mixed_precision` argument; None leaves the choice to the launcher."""
    if requested != "auto":
        return requested
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        return None
    return "bf16" if has_native_bf16() else None


def _uses_cpu() -> bool:
    """Return whether the run is on the CPU: no accelerator is available, or `ACCELERATE_USE_CPU` is set."""
    return not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")


def _started_by_accelerate() -> bool:
    """Return whether `accelerate launch` started this process: it always sets the precision."""
    return "ACCELERATE_MIXED_PRECISION" in os.environ


def _set_num_threads(accelerator: Accelerator) -> None:
    """Share the CPU's cores among the local processes, where `accelerate launch` would use one thread for each."""
    default = _started_by_accelerate() and os.environ.get("OMP_NUM_THREADS") == "1"
    if accelerator.device.type == "cpu" and default:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def _register_exit_delay(accelerator: Accelerator) -> None:
    """Let gloo's threads release the tensors of the last collectives before Python exits.

    They need the interpreter to do so, and abort the process if it is already shutting down (pytorch/pytorch#190489).
    A collective cannot be used to wait for them: after an error the other ranks may be gone.
    """
    if accelerator.num_processes > 1:
        atexit.unregister(_sleep_before_exit)  # registered once, however many Accelerators are built
        atexit.register(_sleep_before_exit)


def _sleep_before_exit() -> None:
    time.sleep(_GLOO_CLEANUP_SECONDS)


def _check_tracker(name: str) -> None:
    """Raise for a tracker that Accelerate does not support, or would skip silently because it is not installed."""
    supported, installed = LoggerType.list(), [str(tracker) for tracker in get_available_trackers()]
    available = installed + [custom for custom in LOGGER_TYPE_TO_CLASS if custom not in supported]
    if name in available or (name == "all" and installed):
        return
    if name == "all":
        reason = "no tracker is installed. Run for example `pip install tensorboard`"
    elif name in supported:
        reason = f"the tracker is not installed. Run `pip install {name}`"
    else:
        reason = f"Accelerate has no such tracker. Choose one of {', '.join(supported)}"
    raise ConfigError(f"log_with={name!r}: {reason}. Available: {', '.join(available) or 'none'}.")


def _check_parallelism_sizes() -> None:
    """Raise if the launch file's parallelism sizes do not multiply to the world size.

    Accelerate raises for this as well, but its error names neither the sizes nor the world size.
    """
    if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG") != "true":
        return
    sizes, world_size = ParallelismConfig(), int(os.environ.get("WORLD_SIZE", "1"))
    if sizes.total_size != world_size:
        raise LaunchError(
            f"The launcher's parallelism_config is for {sizes.dp_replicate_size} × {sizes.dp_shard_size} processes "
            f"(dp_replicate_size × dp_shard_size), but the launcher started {world_size}. Set the sizes so that their "
            f"product is num_processes."
        )


def _check_precision(precision: str | None, device: str) -> None:
    if precision == "fp8" or (precision, device) == ("fp16", "cpu"):
        raise LaunchError(
            f"mixed_precision={precision!r} is not supported on {device} (Accelerate would silently use float32). "
            f"Choose 'bf16' or 'no'."
        )


def _check_launch(accelerator: Accelerator) -> None:
    """Raise where Accelerate would silently run something else than what the launcher was asked for."""
    expected, actual = int(os.environ.get("WORLD_SIZE", "1")), accelerator.num_processes
    if expected != actual:
        raise LaunchError(
            f"The launcher started {expected} processes, but Accelerate sees {actual}: each would train "
            f"alone and overwrite the others' files. To run several processes on CPU, set "
            f"ACCELERATE_USE_CPU=true and launch with --multi_gpu --num_processes {expected}; on GPUs, check that "
            f"torch.cuda.is_available() is True."
        )
    # Asked for several processes, Accelerate's single-process launcher sets a rendezvous address, but no world size.
    if actual == 1 and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ and _started_by_accelerate():
        raise LaunchError(
            "`accelerate launch` was asked for several processes but started one (it does so with --cpu, and with "
            "distributed_type MULTI_CPU). Set ACCELERATE_USE_CPU=true and launch with --multi_gpu instead, or use "
            "--num_processes 1."
        )
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and accelerator.distributed_type != DistributedType.FSDP:
        raise LaunchError(
            f"The launcher asked for FSDP, but Accelerate runs {accelerator.distributed_type.value} (it does so when "
            f"there is no GPU). Launch without FSDP, or on GPUs."
        )
    if accelerator.parallelism_config is not None and accelerator.distributed_type != DistributedType.FSDP:
        raise LaunchError(
            "The launcher's parallelism_config requires FSDP, which this launch does not use: every process would "
            "hold the full model. Remove parallelism_config, or launch with FSDP."
        )
    if accelerator.distributed_type in _UNSUPPORTED:
        raise LaunchError(
            f"The launcher's distributed_type {accelerator.distributed_type.value} is not supported. Use MULTI_GPU "
            f"(DDP), or FSDP where the model does not fit on one GPU."
        )
    _check_precision(accelerator.mixed_precision, accelerator.device.type)
