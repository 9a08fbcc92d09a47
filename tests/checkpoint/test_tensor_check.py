from pathlib import Path

import pytest
import torch

from homebrew.checkpoint.tensor_check import check_tensors
from homebrew.errors import CorruptCheckpoint

EXPECTED = {"weight": (2, 3), "bias": (3,)}
VALID = {"weight": torch.zeros(2, 3), "bias": torch.zeros(3, dtype=torch.bfloat16)}


def test_accepts_any_floating_dtype():
    check_tensors(Path("model.safetensors"), VALID, EXPECTED)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weight": VALID["weight"]}, "has no tensor bias"),
        (VALID | {"extra": torch.zeros(1)}, "has an unknown tensor extra"),
        (VALID | {"weight": torch.zeros(3, 2)}, r"weight is torch.float32 of shape \(3, 2\)"),
        (VALID | {"bias": torch.zeros(3, dtype=torch.int64)}, r"bias is torch.int64"),
    ],
)
def test_rejects_other_tensors(tensors, message):
    with pytest.raises(CorruptCheckpoint, match=rf"model\.safetensors.*{message}"):
        check_tensors(Path("model.safetensors"), tensors, EXPECTED)
