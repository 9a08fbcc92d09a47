"""The dtype of matrix products under autocast."""

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of matrix products with `x`: autocast's if it is enabled, else that of `x`."""
    device = x.device.type
    dtype: torch.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    return dtype
