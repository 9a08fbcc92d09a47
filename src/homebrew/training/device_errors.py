"""Errors of the device, turned into ones that say what to change."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator

from homebrew.errors import ModelError, TrainingError
from homebrew.training.batch_size import MEMORY_ADVICE, BatchPlan


@contextmanager
def explain_out_of_memory(accelerator: Accelerator, plan: BatchPlan) -> Iterator[None]:
    """Turn an out-of-memory error within the context into one that says what to change.

    Raises:
        TrainingError: A step ran out of memory.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        smaller = next((n for n in range(plan.micro_batch_size - 1, 0, -1) if plan.micro_batch_size % n == 0), None)
        advice = MEMORY_ADVICE
        if smaller is not None:
            advice = (
                f"Lower micro_batch_size: {smaller} or 'auto' keeps the global batch. Alternatively: {MEMORY_ADVICE}"
            )
        raise TrainingError(
            f"Process {accelerator.process_index} ran out of memory on {accelerator.device} with "
            f"micro_batch_size={plan.micro_batch_size}. {advice}"
        ) from error


@contextmanager
def explain_device_asserts() -> Iterator[None]:
    """Turn a failed assertion of a CUDA kernel into an error that says what to change.

    On a CPU, PyTorch raises an IndexError instead, which the model's interface explains.

    Raises:
        ModelError: A kernel has met an index that is out of range.
    """
    try:
        yield
    except RuntimeError as error:
        if "device-side assert" not in str(error):
            raise
        raise ModelError(
            "An index on the GPU is out of range, most likely a token id outside the model's vocabulary. Use the "
            "model's tokenizer; if the model's loss ignores another target than -100, set its attribute ignore_index. "
            "Then restart the process, or the notebook's kernel: this process can no longer use the GPU."
        ) from error
