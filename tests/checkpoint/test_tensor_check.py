from pathlib import Path

import pytest
import torch

from homebrew.checkpoint.tensor_check import check_tensors, find_non_finite
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


@pytest.mark.parametrize("value", [1e300, -1e39, float("inf"), float("nan")])
@pytest.mark.parametrize("file", ["model", "adapter", "guard"])
def test_float64_has_to_be_finite_in_float32_which_it_is_loaded_as(file, value):
    tensors = {"w": torch.tensor([1.0, 3e38], dtype=torch.float64), "x": torch.tensor([value], dtype=torch.float64)}
    assert find_non_finite(file, tensors) == "x"
    assert find_non_finite(file, tensors, constants={"x"}) is None


def test_an_optimizers_state_may_be_infinite_but_not_nan():
    tensors = {"w//smallest": torch.tensor(float("inf")), "w//codes": torch.ones(2, dtype=torch.uint8)}
    assert find_non_finite("optimizer", tensors) is None
    assert find_non_finite("optimizer", tensors | {"w//m": torch.tensor([1.0, float("nan")])}) == "w//m"


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float32, torch.complex64])
def test_every_dtype_is_checked(dtype):
    tensors = {"w": torch.ones(2).to(dtype), "x": torch.tensor([float("inf")]).to(dtype)}
    assert find_non_finite("model", tensors) == "x"
