"""States of the random number generators of Python, NumPy and PyTorch, as tensors."""

import random

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from homebrew.errors import CorruptCheckpoint

_NUMPY_WORDS = 624


def rng_state() -> dict[str, Tensor]:
    """Return the generator states of this process: Python, NumPy, PyTorch on the CPU and on the current device."""
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002 - libraries use it
    state = {
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": torch.tensor([float("nan") if gauss is None else gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(np.append(np.asarray(keys, dtype=np.int64), [position, has_gauss])),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def check_rng(state: dict[str, Tensor]) -> None:
    """Check that `restore_rng` can restore a state, by restoring it to throwaway generators."""
    try:
        random.Random().setstate(_python_state(state))  # noqa: S311 - not for secrets
        np.random.RandomState().set_state(_numpy_state(state))
        torch.Generator().set_state(state["torch"])
        if torch.cuda.is_available() and "cuda" in state:
            torch.Generator("cuda").set_state(state["cuda"])
    except (LookupError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CorruptCheckpoint(f"The saved random states cannot be restored: {error!r}.") from error


def restore_rng(state: dict[str, Tensor]) -> None:
    """Restore the states returned by `rng_state`; a device's state only if this process has such a device.

    Raises:
        CorruptCheckpoint: A generator's state is missing or invalid; no generator has been changed.
    """
    check_rng(state)
    random.setstate(_python_state(state))
    np.random.set_state(_numpy_state(state))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
    if torch.backends.mps.is_available() and "mps" in state:
        torch.mps.set_rng_state(state["mps"])


def _python_state(state: dict[str, Tensor]) -> tuple[int, tuple[int, ...], float | None]:
    version, *words = state["python"].tolist()
    gauss = state["python_gauss"].item()
    return version, tuple(words), None if gauss != gauss else gauss


def _numpy_state(state: dict[str, Tensor]) -> tuple[str, NDArray[np.uint32], int, int, float]:
    *keys, position, has_gauss = state["numpy"].tolist()
    if not 0 <= position <= len(keys) == _NUMPY_WORDS:  # NumPy does not check and would read out of bounds
        raise ValueError(f"{len(keys)} words and position {position}")
    return "MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, state["numpy_gauss"].item()
