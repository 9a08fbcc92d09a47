import pytest
import torch
from safetensors.torch import load

from homebrew.checkpoint.safetensors_writer import serialised

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


def test_the_library_reads_what_is_written():
    read = load(b"".join(serialised(TENSORS)))
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


def test_no_tensor_is_copied():
    tensor = torch.zeros(1000)
    _, piece = serialised({"t": tensor})
    tensor[0] = 1.0
    assert bytes(piece[:4]) == b"\x00\x00\x80\x3f"


def test_nothing_is_a_file_too():
    assert load(b"".join(serialised({}))) == {}


@pytest.mark.parametrize("name", list(TENSORS))
def test_every_tensor_lies_aligned(name):
    header, *pieces = serialised(TENSORS)
    start = len(header)
    for piece, key in zip(pieces, sorted(TENSORS, key=lambda n: (-TENSORS[n].element_size(), n)), strict=True):
        if key == name:
            assert start % TENSORS[key].element_size() == 0
        start += len(piece)
