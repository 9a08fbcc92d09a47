import pytest
import torch
from safetensors.torch import load

from homebrew.checkpoint.safetensors_writer import serialize

TENSORS = {
    "matrix": torch.randn(3, 5),
    "scalar": torch.tensor(7.0),
    "empty": torch.zeros(0, 4),
    "half": torch.randn(3).bfloat16(),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "wide": torch.arange(4),
    "flags": torch.tensor([True, False]),
    'naïve "name"': torch.randn(2, 2, 2, dtype=torch.float64),
}


def test_safetensors_reads_what_is_written():
    read = load(b"".join(serialize(TENSORS)))
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


def test_no_tensor_is_copied():
    tensor = torch.zeros(1000)
    _, buffer = serialize({"t": tensor})
    tensor[0] = 1.0
    assert bytes(buffer[:4]) == b"\x00\x00\x80\x3f"


def test_an_empty_file():
    assert load(b"".join(serialize({}))) == {}


@pytest.mark.parametrize("name", list(TENSORS))
def test_every_tensor_is_aligned(name):
    header, *buffers = serialize(TENSORS)
    start = len(header)
    for buffer, key in zip(buffers, sorted(TENSORS, key=lambda n: (-TENSORS[n].element_size(), n)), strict=True):
        if key == name:
            assert start % TENSORS[key].element_size() == 0
        start += len(buffer)
