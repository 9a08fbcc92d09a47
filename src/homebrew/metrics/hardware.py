"""Device properties: peak FLOP/s and peak memory."""

import re

import torch

_PEAK_TFLOPS: dict[str, dict[str, float]] = {
    # Dense tensor-core peaks from the vendors' datasheets, by GPU model (see `_gpu_model`). "float32" is TF32.
    "B200": {"bfloat16": 2250, "float32": 1125},
    "H200": {"bfloat16": 989, "float32": 494},
    "H200 NVL": {"bfloat16": 835, "float32": 417},
    "GH200": {"bfloat16": 989, "float32": 494},
    "H100": {"bfloat16": 989, "float32": 494},
    "H100 NVL": {"bfloat16": 835, "float32": 417},
    "H100 PCIE": {"bfloat16": 756, "float32": 378},
    "A100": {"bfloat16": 312, "float32": 156},
    "A100 PCIE": {"bfloat16": 312, "float32": 156},
    "L40S": {"bfloat16": 362, "float32": 183},
    "L40": {"bfloat16": 181, "float32": 90},
    "L4": {"bfloat16": 121, "float32": 60},
    "A10G": {"bfloat16": 70, "float32": 35},
    "RTX 5090": {"bfloat16": 209.5, "float32": 104.8},
    "RTX 4090": {"bfloat16": 165.2, "float32": 82.6},
    "RTX 3090": {"bfloat16": 71, "float32": 35.6},
    "T4": {"float16": 65},
    "V100": {"float16": 125},
    "V100 PCIE": {"float16": 112},
}
_IRRELEVANT_TO_SPEED = re.compile(r"NVIDIA|TESLA|GEFORCE|SXM\d?|HBM3E?|\d+GB?")
"""Words of a device name that do not change the peak. With any other word, such as "Laptop" or "MIG", the device is a
different model, whose peak is unknown unless the table lists it."""


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the peak FLOP/s of a device for dense matrix products, or None if unknown.

    Args:
        device: Device to look up; only CUDA devices are known.
        dtype: Data type of the matrix products. float16 has bfloat16's peak unless the table lists it separately.
    """
    if device.type != "cuda":
        return None
    peaks = _PEAK_TFLOPS.get(_gpu_model(torch.cuda.get_device_name(device)), {})
    name = str(dtype).removeprefix("torch.")
    tflops = peaks.get(name, peaks.get("bfloat16") if name == "float16" else None)
    return None if tflops is None else tflops * 1e12


def peak_memory_bytes(device: torch.device) -> int | None:
    """Return the peak memory this process has allocated on a CUDA device, in bytes; None on other devices."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def _gpu_model(device_name: str) -> str:
    """Reduce "NVIDIA A100-SXM4-40GB" to "A100"."""
    words = re.split("[ -]", device_name.upper())
    return " ".join(word for word in words if not _IRRELEVANT_TO_SPEED.fullmatch(word))
