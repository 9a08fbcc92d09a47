"""Compares loaded tensors with the names and shapes a model needs."""

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
            raise CorruptCheckpoint(f"{path} has a tensor {name}, which the model does not have.")
        tensor, shape = tensors[name], expected[name]
        if tuple(tensor.shape) != shape or not tensor.is_floating_point():
            raise CorruptCheckpoint(
                f"{path}: {name} is {tensor.dtype} of shape {tuple(tensor.shape)}, but the model needs a "
                f"floating-point tensor of shape {shape}."
            )
