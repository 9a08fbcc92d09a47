import pytest
import torch

from homebrew.metrics.hardware import peak_flops


@pytest.mark.parametrize(
    ("name", "dtype", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", torch.float16, 989),
        ("NVIDIA A100-SXM4-40GB", torch.bfloat16, 312),
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, 165.2),
        ("Tesla V100-PCIE-16GB", torch.float16, 112),
        ("Tesla T4", torch.bfloat16, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", torch.bfloat16, None),  # slower than the RTX 4090
    ],
)
def test_peak_flops_of_gpu_models(monkeypatch, name, dtype, tflops):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: name)
    assert peak_flops(torch.device("cuda"), dtype) == (None if tflops is None else tflops * 1e12)


def test_peak_flops_of_a_cpu_is_unknown():
    assert peak_flops(torch.device("cpu"), torch.float32) is None
