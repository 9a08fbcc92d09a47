"""Process-wide state of PyTorch and Accelerate. The number of CPU threads is set in distributed/launch.py."""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from homebrew.errors import ConfigError
from homebrew.model import ops

_TRAINING = threading.RLock()
"""Held by the thread that is training."""
_TRAINERS: list[object] = []
"""Trainers that are training, each in a callback of the one before."""

RECOMPILE_LIMIT = 64
"""Compiled variants of one function. PyTorch's limit is 8, beyond which the function silently runs uncompiled. All
models of a process share the limit, each in training and in evaluation, so four models in one notebook reach it."""

_CACHEABLE_FUNCTIONS = ("torch.nn.attention._backend_from_string", "torch.nn.attention._sdpa_kernel")


def allow_tf32(device: torch.device) -> None:
    """Let float32 matrix products on a CUDA GPU use TF32: 10 bits of mantissa, several times the throughput.

    In bf16 training this affects only what autocast leaves in float32. Undo it with
    `torch.set_float32_matmul_precision("highest")`.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")


@contextmanager
def exclusive_training(trainer: object) -> Iterator[None]:
    """Raise ConfigError if `trainer` is in such a block, or any trainer in another thread is.

    Accelerate's gradient state belongs to the process. A callback can train another model, because that is the same
    thread and happens between two steps.
    """
    if not _TRAINING.acquire(blocking=False):
        raise ConfigError(
            "Another thread of this process is training, and Accelerate supports one at a time. Train one model after "
            "the other, or use a process for each."
        )
    try:
        if trainer in _TRAINERS:
            raise ConfigError(
                "train() was called while this Trainer is training, for example in a callback. Call it after the run, "
                "which ends if a callback sets trainer.should_stop = True."
            )
        _TRAINERS.append(trainer)
        try:
            yield
        finally:
            _TRAINERS.pop()
    finally:
        _TRAINING.release()


def configure_compiler() -> None:
    """Set what torch.compile has no arguments for; called only if the model is compiled.

    - Dynamo's limit of compiled variants becomes `RECOMPILE_LIMIT`.
    - Dynamo sees the hooks of modules. By default it does not compare them: those on one block would be left out,
      because it runs the code of another block, and so would backward hooks.
    - Cached graphs are separate for each version of the operators; see `separate_compile_cache`.
    - Graphs in which an attention kernel is selected are cached over processes. PyTorch does not know that its
      functions for that can be cached, and would spend 6 s per process on GPT-2 small.
    """
    from torch._dynamo import config  # takes a second to import
    from torch._inductor import config as inductor_config

    config.recompile_limit = max(config.recompile_limit, RECOMPILE_LIMIT)
    config.skip_nnmodule_hook_guards = False
    separate_compile_cache()
    inductor_config.unsafe_marked_cacheable_functions |= dict.fromkeys(_CACHEABLE_FUNCTIONS, torch.__version__)


def separate_compile_cache() -> None:
    """Let torch.compile use only cached graphs that were traced with the present operators of the model.

    Another version of homebrew may have an operator of the same name with other outputs.
    """
    from torch.compiler import config

    sources = sorted(Path(ops.__path__[0]).glob("*.py"))
    tag = f"homebrew {hashlib.sha256(b''.join(file.read_bytes() for file in sources)).hexdigest()}"
    if tag not in config.cache_key_tag:
        config.cache_key_tag += tag
