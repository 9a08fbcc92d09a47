"""Tensors as a safetensors file's bytes, piece by piece.

The library's own writer first makes one string of everything, during which no other thread of Python runs: a
second and a gigabyte for GPT-2 small, in the middle of training. Reading is the library's.
"""

import json
from collections.abc import Mapping

import torch
from torch import Tensor

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


def serialised(tensors: Mapping[str, Tensor]) -> list[memoryview]:
    """A safetensors file: its header, then each tensor's own memory, which nothing may change meanwhile.

    Args:
        tensors: on the CPU, contiguous.

    Returns:
        The file's bytes, in pieces.
    """
    # Aligned by their size: the widest first, as the format asks.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header, end = {}, 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        header[name] = {
            "dtype": _DTYPES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return [memoryview(len(text).to_bytes(8, "little") + text), *(_memory(tensors[name]) for name in names)]


def _memory(tensor: Tensor) -> memoryview:
    return tensor.detach().flatten().view(torch.uint8).numpy().data
