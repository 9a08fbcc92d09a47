"""Checks of the launcher's settings: number of processes, engine, CPU threads."""

import os

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from homebrew.cores import num_available_cores
from homebrew.distributed.precision import check_precision
from homebrew.errors import LaunchError

_UNSUPPORTED = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA)


def check_launch(accelerator: Accelerator) -> None:
    """Check that Accelerate does not silently ignore the launcher's settings.

    Raises:
        LaunchError: The number of processes is not the launcher's, or the engine or precision is not supported.
    """
    expected, actual = int(os.environ.get("WORLD_SIZE", "1")), accelerator.num_processes
    if expected != actual:
        raise LaunchError(
            f"The launcher started {expected} processes, but Accelerate sees {actual}: each would train "
            f"alone and overwrite the others' files. To run several processes on CPU, set "
            f"ACCELERATE_USE_CPU=true and launch with --multi_gpu --num_processes {expected}; on GPUs, check that "
            f"torch.cuda.is_available() is True."
        )
    # If several processes were requested, Accelerate's single-process launcher sets a rendezvous address but no world
    # size.
    if actual == 1 and "WORLD_SIZE" not in os.environ and _set_by_launcher("MASTER_ADDR", "MASTER_PORT"):
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
    check_precision(str(accelerator.mixed_precision), accelerator.device.type)


def set_num_threads(accelerator: Accelerator) -> None:
    """On a CPU, share the available cores among the local processes if `accelerate launch` set one thread for each.

    If the user chose the number of threads, it is kept.
    """
    if accelerator.device.type == "cpu" and _set_by_launcher("OMP_NUM_THREADS"):
        num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, num_available_cores() // num_processes))


def _set_by_launcher(*names: str) -> bool:
    """Return whether `accelerate launch` itself chose the value of one of these environment variables.

    The launcher is this process's parent. Variables that the user has set are in the launcher's environment, too.
    """
    if "ACCELERATE_MIXED_PRECISION" not in os.environ:  # always set by `accelerate launch`
        return False
    try:
        launcher = psutil.Process().parent()
        environment = {} if launcher is None else launcher.environ()
        arguments = [] if launcher is None else launcher.cmdline()
    except psutil.Error:  # the launcher has ended, or its environment may not be read
        return True
    if "OMP_NUM_THREADS" in names and any(name.startswith("--num_cpu_threads_per_process") for name in arguments):
        return False
    return any(os.environ.get(name) != environment.get(name) for name in names)
