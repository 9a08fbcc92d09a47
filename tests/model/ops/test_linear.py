"""Tests of linear layers with the fastest matrix products. On a CPU, PyTorch computes these."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode

from homebrew.model.ops.linear import _column_sums, apply_linear, is_plain

pytestmark = pytest.mark.usefixtures("kernels_on_cpu")


def random_layer(frozen=""):
    torch.manual_seed(0)
    layer = nn.Linear(8, 24)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad = name not in frozen.split()
    return layer


def outputs_and_gradients(function, layer, x):
    y = function(layer, x)
    inputs = [tensor for tensor in (x, *layer.parameters()) if tensor.requires_grad]
    d_y = torch.linspace(-1, 2, y.numel()).view(y.shape).to(y.dtype)
    return y, *torch.autograd.grad(y, inputs, d_y)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("frozen", ["", "x", "weight", "bias", "weight bias", "x weight"])
def test_output_and_gradients_are_those_of_the_layer(frozen, compiled):
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1)).requires_grad_("x" not in frozen)
    function = torch.compile(apply_linear, fullgraph=True, backend="aot_eager") if compiled else apply_linear
    expected = outputs_and_gradients(lambda layer, x: layer(x), random_layer(frozen), x)
    for actual, true in zip(outputs_and_gradients(function, random_layer(frozen), x), expected, strict=True):
        torch.testing.assert_close(actual, true)


def test_products_run_in_the_dtype_of_autocast():
    layer, x = random_layer(), torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = apply_linear(layer, x)
        torch.testing.assert_close(y, F.linear(x, layer.weight, layer.bias))
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.weight.grad.dtype == torch.float32
    assert torch.equal(layer.bias.grad, torch.full((24,), 3.0))


@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"])
def test_hooks_are_called(kind):
    layer, calls = random_layer(), []
    assert is_plain(layer)
    getattr(layer, f"register_{kind}")(lambda *a: calls.append(kind))
    apply_linear(layer, torch.randn(3, 8, requires_grad=True)).sum().backward()
    assert calls == [kind]


def test_a_layer_of_another_class_is_called():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layer, x = Doubled(8, 24), torch.randn(3, 8)
    assert torch.equal(apply_linear(layer, x), layer(x))


class Quantized(torch.Tensor):
    """A weight less 1, which only `F.linear` understands."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear:
            return function(args[0], args[1].as_subclass(torch.Tensor) + 1, args[2])
        raise NotImplementedError(f"{function} of a quantized weight")


def test_a_weight_of_another_class_is_passed_to_the_layer():
    layer, x = random_layer("weight bias"), torch.randn(3, 8)
    expected = F.linear(x, layer.weight + 1, layer.bias)
    layer._parameters["weight"] = layer.weight.as_subclass(Quantized)
    assert torch.equal(apply_linear(layer, x), expected)


def test_a_layer_without_bias_is_called():
    layer, x = nn.Linear(8, 24, bias=False), torch.randn(3, 8)
    assert torch.equal(apply_linear(layer, x), layer(x))


def test_a_replaced_forward_is_called():
    layer = random_layer()
    layer.forward = lambda x: 2 * x
    assert torch.equal(apply_linear(layer, torch.ones(3)), torch.full((3,), 2.0))


def test_a_hook_of_all_modules_is_called():
    layer, calls = random_layer(), []
    hook = register_module_forward_hook(lambda module, _, y: calls.append(module))
    try:
        apply_linear(layer, torch.randn(3, 8))
    finally:
        hook.remove()
    assert calls == [layer]


def test_operations_are_counted():
    with FlopCounterMode(display=False) as counter:
        apply_linear(random_layer(), torch.randn(3, 8, requires_grad=True)).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 3 * 8 * 24


@pytest.mark.parametrize("shape", [(20_000, 24), (20_000, 5), (0, 8)])
def test_column_sums_are_those_of_float64(shape):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    for matrix in (x, x[:, :1].expand(-1, 3)):
        sums = _column_sums(matrix)
        assert sums.dtype == torch.float32
        torch.testing.assert_close(sums.double(), matrix.double().sum(0), rtol=1e-5, atol=0)


def test_an_empty_batch():
    layer, x = random_layer(), torch.randn(0, 5, 8, requires_grad=True)
    y = apply_linear(layer, x)
    y.sum().backward()
    assert y.shape == (0, 5, 24)
    assert x.grad.shape == x.shape
    assert not layer.weight.grad.any()


def test_dynamic_shapes_share_one_graph():
    layer, backend = random_layer(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(apply_linear, fullgraph=True, dynamic=True, backend=backend)
    for length in (5, 7, 9):
        x = torch.randn(2, length, 8, requires_grad=True)
        y = compiled(layer, x)
        y.sum().backward()
        torch.testing.assert_close(y, layer(x))
    assert backend.frame_count == 1


def test_operators_pass_opcheck():
    x, layer, d_y = torch.randn(3, 8, requires_grad=True), random_layer(), torch.randn(3, 24)
    torch.library.opcheck(torch.ops.homebrew.linear.default, (x, layer.weight, layer.bias))
    for needs in ((True, True, True), (True, False, False), (False, True, False), (False, False, True)):
        arguments = (d_y, x.detach(), layer.weight.detach(), *needs)
        torch.library.opcheck(torch.ops.homebrew.linear_backward.default, arguments)
