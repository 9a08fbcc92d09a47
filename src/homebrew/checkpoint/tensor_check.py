"""Checks tensors: names and shapes against what a model needs, and values for NaN and infinity."""

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from homebrew.bounded_readers import SAFETENSORS_DTYPES
from homebrew.distributed.fsdp import local_shard
from homebrew.errors import CorruptCheckpoint, NonFiniteError


def check_tensors(path: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CorruptCheckpoint unless a file has exactly the expected names and shapes, in any floating-point dtype."""
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            raise CorruptCheckpoint(f"{path} has no tensor {name}, which the model needs.")
        if name not in expected:
            raise CorruptCheckpoint(f"{path} has an unknown tensor {name}, which the model does not have.")
        tensor, shape = tensors[name], expected[name]
        if tuple(tensor.shape) != shape or not tensor.is_floating_point():
            raise CorruptCheckpoint(
                f"{path}: {name} is {tensor.dtype} of shape {tuple(tensor.shape)}, but the model needs a "
                f"floating-point tensor of shape {shape}."
            )


def is_savable(tensor: Tensor) -> bool:
    """Return whether a tensor can be saved: its dtype and layout are supported, and it is not on the meta device."""
    return str(tensor.dtype) in SAFETENSORS_DTYPES and tensor.layout is torch.strided and not tensor.is_meta


def describe(tensor: Tensor) -> str:
    """Describe a tensor by the properties that `is_savable` checks."""
    return f"{tensor.dtype} {type(tensor).__name__} ({tensor.layout}{', without values' if tensor.is_meta else ''})"


def find_non_finite(file: str, tensors: Mapping[str, Tensor], constants: Collection[str] = ()) -> str | None:
    """Return the name of the first tensor that has a NaN, an infinity or a value above float32's range, or None.

    Random states (files `rng-0`, ...) and `constants`, such as a mask of -inf, may have any values. An optimizer's
    state may be infinite but not NaN: the smallest loss so far, for example, starts at infinity. Of a sharded tensor,
    only the local shard is checked.
    """
    if file.startswith("rng-"):
        return None
    is_valid = _has_no_nan if file == "optimizer" else _is_finite
    return next((name for name, tensor in tensors.items() if name not in constants and not is_valid(tensor)), None)


def check_finite(step: int, files: Mapping[str, Mapping[str, Tensor]], constants: Collection[str]) -> None:
    """Raise NonFiniteError if `find_non_finite` finds a tensor that is about to be saved."""
    for file, tensors in files.items():
        if bad := find_non_finite(file, tensors, constants):
            raise NonFiniteError(f"The checkpoint of step {step} was not saved: {bad} in {file} is not finite.")


def _has_no_nan(tensor: Tensor) -> bool:
    return not local_shard(tensor).isnan().any()


def _is_finite(tensor: Tensor) -> bool:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    local = local_shard(tensor)
    if local.is_floating_point():
        # Training and inference load float64 as float32, where it may overflow. isfinite does not support float8.
        local = local if local.element_size() in (2, 4) else local.float()
    return bool(local.isfinite().all())
