"""Changes process-wide PyTorch settings. The number of CPU threads is set in distributed/accelerator.py."""

import torch

RECOMPILE_LIMIT = 64
"""Compiled variants of one function. PyTorch's limit is 8, beyond which the function silently runs uncompiled. All
models of a process share the limit, each in training and in evaluation, so four models in one notebook reach it."""


def allow_tf32(device: torch.device) -> None:
    """Let float32 matrix products on a CUDA GPU use TF32: 10 bits of mantissa, several times the throughput.

    In bf16 training this affects only what autocast leaves in float32. Undo it with
    `torch.set_float32_matmul_precision("highest")`.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")


def raise_recompile_limit() -> None:
    """Raise Dynamo's limit of compiled variants to `RECOMPILE_LIMIT`; called only if the model is compiled."""
    from torch._dynamo import config  # takes a second to import

    config.recompile_limit = max(config.recompile_limit, RECOMPILE_LIMIT)
