"""Checks tensors: names and shapes against what a model needs, and values for NaN and infinity."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from homebrew.errors import CorruptCheckpoint


def check_tensors(path: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Check that a file holds exactly the expected floating-point tensors.

    Args:
        path: File the tensors were read from, for error messages.
        tensors: Tensors by name; any floating dtype.
        expected: Shape of each expected tensor by name.

    Raises:
        CorruptCheckpoint: A tensor is missing, unknown, of another shape, or not floating-point.
    """
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
    """Return the name of the first tensor that has a NaN or an infinity, or None.

    Args:
        file: Name of the tensors' file without suffix. Random states (`rng-0`, ...) may hold NaN and are not checked.
        tensors: Tensors by name, on any device; sharded tensors are checked for their local shard only.
    """
    if file.startswith("rng-"):
        return None
    return next((name for name, tensor in tensors.items() if not _is_finite(tensor)), None)


def _is_finite(tensor: Tensor) -> bool:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    if local.element_size() == 1:
        local = local.float()  # isfinite is not implemented for float8
    return bool(local.isfinite().all())
