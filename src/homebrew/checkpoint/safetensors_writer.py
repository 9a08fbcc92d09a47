"""Serializes tensors to the safetensors format without copying them.

`safetensors.torch.save` builds one byte string of all tensors while it holds the GIL. For GPT-2 small that takes a
second and a gigabyte, and stalls training. Files are read by the safetensors library.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from homebrew.bounded_readers import SAFETENSORS_DTYPES
from homebrew.io import strict_json


def serialize(tensors: Mapping[str, Tensor]) -> list[memoryview]:
    """Return a safetensors file as buffers: the header, then the memory of each contiguous CPU tensor.

    The tensors must not change while the buffers are in use.
    """
    # Widest dtype first, so that every tensor is aligned, as the format requires.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header, end = {}, 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        header[name] = {
            "dtype": SAFETENSORS_DTYPES[str(tensors[name].dtype)],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    text = strict_json(header).encode()
    text += b" " * (-len(text) % 8)
    return [memoryview(len(text).to_bytes(8, "little") + text), *(_memory(tensors[name]) for name in names)]


def _memory(tensor: Tensor) -> memoryview:
    return tensor.detach().flatten().view(torch.uint8).numpy().data
