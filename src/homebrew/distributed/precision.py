"""The run's precision: the requested one, what the hardware supports, and what decided it."""

import os

import torch
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env

from homebrew.errors import LaunchError

PRECISION_NAMES = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}


def resolve_mixed_precision(requested: str) -> str:
    """Return the precision for a config's `mixed_precision`.

    "auto" is the launcher's precision if it is "bf16" or "fp16", otherwise "bf16" where the hardware supports it. The
    launcher's "no" does not count: `accelerate launch` also sets it if the user chose no precision.

    Args:
        requested: "auto", "no", "bf16" or "fp16".

    Raises:
        LaunchError: The precision is not supported on a CPU.
    """
    precision = requested if requested != "auto" else _launcher_precision() or ("bf16" if has_native_bf16() else "no")
    if uses_cpu():
        check_precision(precision, "cpu")
    return precision


def describe_precision(accelerator: Accelerator, requested: str) -> str:
    """Return the name of the run's precision and what decided it, such as "bfloat16 (the default on this device)".

    Args:
        accelerator: The run's Accelerator.
        requested: The config's `mixed_precision`.
    """
    precision = str(accelerator.mixed_precision)
    if requested != "auto":
        reason = f"mixed_precision={requested!r}"
    elif precision != resolve_mixed_precision("auto"):
        reason = "chosen by the given Accelerator"
    elif _launcher_precision() is not None:
        reason = "chosen by the launcher"
    else:
        reason = "the default on this device" if precision == "bf16" else "the device has no native bfloat16"
    return f"{PRECISION_NAMES.get(precision, precision)} ({reason})"


def has_native_bf16() -> bool:
    """Return whether the device multiplies bfloat16 matrices natively, without emulation."""
    if uses_cpu():
        return bool(torch.cpu._is_avx512_bf16_supported())
    return torch.cuda.is_available() and bool(torch.cuda.is_bf16_supported(including_emulation=False))


def uses_cpu() -> bool:
    """Return whether the run is on the CPU: no accelerator is available, or `ACCELERATE_USE_CPU` is set."""
    return not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")


def check_precision(precision: str, device: str) -> None:
    """Raise `LaunchError` for a precision that Accelerate would silently replace by float32."""
    if precision == "fp8" or (precision, device) == ("fp16", "cpu"):
        raise LaunchError(
            f"mixed_precision={precision!r} is not supported on {device} (Accelerate would silently use float32). "
            f"Choose 'bf16' or 'no'."
        )


def _launcher_precision() -> str | None:
    """Return the precision that was requested from the launcher, or None if none was requested."""
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    return None if precision == "no" else precision
