"""Tests of cuDNN's attention. On a CPU, PyTorch stands in for cuDNN."""

import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from homebrew import GPT, GPTConfig, LoRAConfig, add_lora
from homebrew.model.ops import attention, cudnn_attention
from homebrew.model.ops.attention import self_attention


def exact(q, k, v):
    """Attention in float32, of tensors (B, nh, T, hs)."""
    return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)


class StandInPlan:
    """Computes the gradients by their formulas, and writes them where cuDNN would.

    cuDNN gets addresses only, and relies on the strides that the plan was built for.
    """

    def __init__(self, shape, *_):
        _, T, _, nh, hs = shape
        packed, separate = (T * 3 * nh * hs, hs, 3 * nh * hs, 1), (T * nh * hs, hs, nh * hs, 1)
        self.strides = [*[packed] * 3, *[separate] * 2, (nh * T, T, 1, 1), *[packed] * 3]

    def run(self, *operands):
        assert [x.stride() for x in operands] == self.strides
        q, k, v, y, d_y = (x.float() for x in operands[:5])
        scale = q.shape[-1] ** -0.5
        later = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
        weights = (q @ k.mT * scale).masked_fill(later, -torch.inf).softmax(-1)
        d_scores = weights * (d_y @ v.mT - (d_y * y).sum(-1, keepdim=True)) * scale
        gradients = d_scores @ k, d_scores.mT @ q, weights.mT @ d_y
        for output, gradient in zip(operands[6:], gradients, strict=True):
            output.copy_(gradient)


@pytest.fixture
def cudnn(monkeypatch):
    """Whether cuDNN is used depends on the device only. On a CPU, it is replaced."""
    if torch.cuda.is_available():
        pytest.importorskip("cudnn")
        if torch.cuda.get_device_capability() != cudnn_attention.HOPPER:
            pytest.skip("needs a Hopper GPU")
        return "cuda"

    def forward(q, k, v):
        assert {x.stride(-1) for x in (q, k, v)} == {1}  # as cuDNN requires
        y = exact(q, k, v).to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2)
        return y, torch.zeros(*q.shape[:-1], 1)

    monkeypatch.setattr(cudnn_attention, "_forward", forward)
    monkeypatch.setattr(cudnn_attention, "_backward_plan", StandInPlan)
    monkeypatch.setattr(attention, "uses_cudnn", lambda _: True)
    return "cpu"


def random_qkv(device, length, dtype=torch.bfloat16, head_size=32):
    generator = torch.Generator().manual_seed(length)
    return torch.randn(2, length, 3, 4, head_size, generator=generator).to(device, dtype).requires_grad_()


def output_and_gradient(attend, qkv):
    y = attend(qkv)
    weights = torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape)
    return y, *torch.autograd.grad((y * weights).sum(), qkv)


def attend(qkv):
    return self_attention(qkv, dropout=0.0, training=True)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [64, 65, 200])
def test_output_and_gradient_are_exact(cudnn, monkeypatch, length, dtype, compiled):
    monkeypatch.setattr(attention, "causal_attention", None)  # PyTorch's attention is not used
    qkv = random_qkv(cudnn, length, dtype)
    function = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=False) if compiled else attend
    expected = output_and_gradient(lambda x: exact(*x.transpose(1, 3).unbind(2)).transpose(1, 2), qkv)
    for actual, true in zip(output_and_gradient(function, qkv), expected, strict=True):
        torch.testing.assert_close(actual.float(), true.float(), atol=0.02 * true.abs().max().item(), rtol=0)
    assert output_and_gradient(function, qkv)[1].is_contiguous()


def test_layouts_other_than_the_linear_layers(cudnn):
    qkv = random_qkv(cudnn, 64)
    d_y = torch.randn(64, 2, 4, 32).to(qkv).transpose(0, 1)
    expected = torch.autograd.grad(attend(qkv), qkv, d_y.contiguous())[0]
    strided = qkv.detach().mT.contiguous().mT.requires_grad_()
    actual = torch.autograd.grad(attend(strided), strided, d_y)[0]
    torch.testing.assert_close(actual.float(), expected.float(), atol=0.02 * expected.abs().max().item(), rtol=0)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("checkpointing", "lora"), [(False, False), (True, True)])
def test_gradients_of_a_gpt(cudnn, monkeypatch, compiled, checkpointing, lora):
    def gradients(*, compiled):
        model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=64, block_size=64, vocab_size=128, dropout=0.0))
        if lora:
            add_lora(model, LoRAConfig())
        if checkpointing:
            model.enable_activation_checkpointing()
        model.to(cudnn).train()
        if compiled:
            model.compile(dynamic=False, backend="inductor" if cudnn == "cuda" else "aot_eager")
        ids = torch.arange(2 * 64, device=cudnn).view(2, 64) % 7
        with torch.autocast(cudnn, torch.bfloat16):
            loss = model(ids, ids)
        loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    actual = gradients(compiled=compiled)
    monkeypatch.setattr(attention, "uses_cudnn", lambda _: False)
    for name, expected in gradients(compiled=False).items():
        assert (actual[name] - expected).norm() <= 0.05 * expected.norm(), name


@pytest.mark.parametrize("changes", [{"dropout": 0.1}, {"training": False}])
def test_dropout_and_evaluation_use_pytorch(cudnn, monkeypatch, changes):
    monkeypatch.setattr(attention, "cudnn_attention", None)
    qkv = random_qkv(cudnn, 64)
    assert self_attention(qkv, **({"dropout": 0.0, "training": True} | changes)).shape == (2, 64, 4, 32)


def test_without_gradients_pytorch_is_used(cudnn, monkeypatch):
    monkeypatch.setattr(attention, "cudnn_attention", None)
    with torch.no_grad():
        attend(random_qkv(cudnn, 64))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"dtype": torch.float16}, True),
        ({"dtype": torch.float32}, False),
        ({"device": "cpu"}, False),
        ({"length": 63}, False),
        ({"head_size": 60}, False),
        ({"head_size": 256}, False),
        ({"deterministic": True}, False),
        ({"available": False}, False),
    ],
)
def test_inputs_that_cudnn_supports(monkeypatch, changes, expected):
    case = {"dtype": torch.bfloat16, "device": "cuda:0", "length": 64, "head_size": 64} | changes
    monkeypatch.setattr(cudnn_attention, "is_available", lambda _: changes.get("available", True))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: changes.get("deterministic", False))
    with FakeTensorMode():
        qkv = torch.empty(2, case["length"], 3, 4, case["head_size"], dtype=case["dtype"], device=case["device"])
        assert cudnn_attention.uses_cudnn(qkv) == expected


@pytest.fixture
def nothing_cached():
    """Forget before and after a test whether cuDNN is available."""
    cached = cudnn_attention._can_build_plan, cudnn_attention._backward_plan, cudnn_attention._handle
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


@pytest.mark.usefixtures("nothing_cached")
@pytest.mark.parametrize("installed", ["of this version", "of another version", "not"])
@pytest.mark.parametrize("capability", [cudnn_attention.HOPPER, (10, 0)])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_package_is_used_where_it_works(monkeypatch, compiled, capability, installed):
    def create_handle():
        if installed == "of another version":
            raise RuntimeError
        return next(iter(range(1)))  # cannot be traced

    package = SimpleNamespace(create_handle=create_handle) if installed != "not" else None
    monkeypatch.setitem(sys.modules, "cudnn", package)
    monkeypatch.setattr(cudnn_attention, "_BackwardPlan", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())

    def add_one_if_available(x):
        return x + cudnn_attention.is_available(0)

    if compiled:
        add_one_if_available = torch.compile(add_one_if_available, fullgraph=True, backend="eager")
    is_used = installed == "of this version" and capability == cudnn_attention.HOPPER
    assert add_one_if_available(torch.zeros(1)).item() == is_used


@pytest.mark.parametrize("strided", [False, True])
def test_fake_outputs_have_the_layout_of_real_ones(cudnn, strided):
    qkv = random_qkv(cudnn, 64)
    qkv = qkv.detach().mT.contiguous().mT if strided else qkv
    with torch.no_grad():
        real = cudnn_attention._attention(qkv)
        real = (*real, cudnn_attention._attention_backward(real[0], qkv, *real))
    with FakeTensorMode() as mode, torch.no_grad():
        fake_qkv = mode.from_tensor(qkv)
        fake = cudnn_attention._attention(fake_qkv)
        fake = (*fake, cudnn_attention._attention_backward(fake[0], fake_qkv, *fake))
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("head_size", [8, 40, 64, 128])
def test_the_gradients_are_those_of_pytorch(cudnn, monkeypatch, head_size):
    qkv = random_qkv(cudnn, 256, head_size=head_size)
    actual = output_and_gradient(attend, qkv)
    monkeypatch.setattr(attention, "uses_cudnn", lambda _: False)
    for a, b in zip(actual, output_and_gradient(attend, qkv), strict=True):
        assert (a - b).norm() <= 1e-3 * b.norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_graph_computes_the_gradient(cudnn):
    qkv = random_qkv(cudnn, 128)
    expected = output_and_gradient(attend, qkv)[1]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        output_and_gradient(attend, qkv)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gradient = output_and_gradient(attend, qkv)[1]
    gradient.zero_()
    graph.replay()
    assert (gradient - expected).norm() <= 1e-3 * expected.norm()
