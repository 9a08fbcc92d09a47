"""Checks tensors: names and shapes against what a model needs, and values for NaN and infinity."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from homebrew.errors import CorruptCheckpoint, NonFiniteError


def check_tensors(path: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CorruptCheckpoint unless a file holds exactly the tensors of the expected shapes, of any floating dtype."""
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


def find_non_finite(file: str, tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor that has a NaN, an infinity or a value above float32's range, or None.

    Random states (files `rng-0`, ...) may hold NaN and are not checked. Of sharded tensors, the local shard is checked.
    """
    if file.startswith("rng-"):
        return None
    return next((name for name, tensor in tensors.items() if not _is_finite(tensor)), None)


def check_finite(step: int, file: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise NonFiniteError if `find_non_finite` finds a tensor that is about to be saved."""
    if bad := find_non_finite(file, tensors):
        raise NonFiniteError(f"The checkpoint of step {step} was not saved: {bad} in {file} is not finite.")


def _is_finite(tensor: Tensor) -> bool:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    if local.is_floating_point():
        # Training and inference load float64 as float32, where it may overflow. For float8, isfinite does not exist.
        local = local if local.element_size() in (2, 4) else local.float()
    return bool(local.isfinite().all())
