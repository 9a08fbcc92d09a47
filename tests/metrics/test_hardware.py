import pytest
import torch

from homebrew.metrics.hardware import peak_flops


@pytest.mark.parametrize(
    ("name", "dtype", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989),
        ("NVIDIA H100 80GB HBM3", torch.float16, 989),
        ("NVIDIA H100 80GB HBM3", torch.float32, 494),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756),
        ("NVIDIA H100 NVL", torch.bfloat16, 835),
        ("NVIDIA H200", torch.bfloat16, 989),
        ("NVIDIA GH200 480GB", torch.bfloat16, 989),
        ("NVIDIA A100-SXM4-40GB", torch.bfloat16, 312),
        ("NVIDIA A100 80GB PCIe", torch.bfloat16, 312),
        ("NVIDIA L4", torch.bfloat16, 121),
        ("NVIDIA L40", torch.bfloat16, 181),
        ("NVIDIA L40S", torch.bfloat16, 362),
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, 165.2),
        ("Tesla T4", torch.float16, 65),
        ("Tesla T4", torch.bfloat16, None),
        ("Tesla V100-SXM2-32GB", torch.float16, 125),
        ("Tesla V100-PCIE-16GB", torch.float16, 112),
        # Variants of known GPUs and unknown GPUs: their peaks are, or may be, different.
        ("NVIDIA T400 4GB", torch.float16, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", torch.bfloat16, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", torch.bfloat16, None),
        ("NVIDIA H100 80GB HBM2e", torch.bfloat16, None),
        ("NVIDIA H20", torch.bfloat16, None),
        ("NVIDIA GB200", torch.bfloat16, None),
        ("Tesla V100S-PCIE-32GB", torch.float16, None),
        ("AMD Instinct MI300X", torch.bfloat16, None),
    ],
)
def test_peak_flops_of_gpu_models(monkeypatch, name, dtype, tflops):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: name)
    assert peak_flops(torch.device("cuda"), dtype) == (None if tflops is None else tflops * 1e12)


def test_peak_flops_of_a_cpu_is_unknown():
    assert peak_flops(torch.device("cpu"), torch.float32) is None
