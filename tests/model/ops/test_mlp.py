"""Tests of the MLP and its backward pass, with and without kernels (in PyTorch: fixture `kernels_on_cpu`)."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from homebrew.model.ops import matmul
from homebrew.model.ops.mlp import mlp

NAMES = ("x", "w_in", "b_in", "w_out", "b_out")
SHAPES = ((2, 9, 8), (32, 8), (32,), (8, 32), (8,))


def reference(x, w_in, b_in, w_out, b_out):
    return F.gelu(x @ w_in.T + b_in, approximate="tanh") @ w_out.T + b_out


def random_inputs(frozen="", x_dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    dtypes = (x_dtype, *[torch.float32] * 4)
    return [
        torch.randn(shape, generator=generator).to(dtype).requires_grad_(name not in frozen.split())
        for name, shape, dtype in zip(NAMES, SHAPES, dtypes, strict=True)
    ]


def output_and_gradients(function, inputs):
    y = function(*inputs)
    d_y = torch.linspace(-1, 2, y.numel(), device=y.device).view(y.shape)
    return y, *torch.autograd.grad(y, [x for x in inputs if x.requires_grad], d_y.to(y.dtype))


@pytest.fixture(params=[False, True], ids=["plain", "kernels"])
def both_paths(request):
    """Run the test with and without kernels."""
    if request.param:
        request.getfixturevalue("kernels_on_cpu")


@pytest.mark.usefixtures("both_paths")
@pytest.mark.parametrize(
    "frozen", ["", "x", "w_in", "b_in", "w_out", "b_out", "w_in b_in w_out b_out", "x w_in b_in"], ids=str
)
def test_output_and_gradients_match_the_definition(frozen):
    expected = output_and_gradients(
        reference, [x.detach().double().requires_grad_(x.requires_grad) for x in random_inputs(frozen)]
    )
    for actual, true in zip(output_and_gradients(mlp, random_inputs(frozen)), expected, strict=True):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual.double(), true, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("both_paths")
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_matrix_products_run_in_the_dtype_of_autocast(x_dtype):
    """The backward pass runs outside of autocast, as in training."""
    exact = output_and_gradients(reference, [x.detach().double().requires_grad_() for x in random_inputs("", x_dtype)])
    inputs = random_inputs("", x_dtype)
    with torch.autocast("cpu", torch.bfloat16):
        y = mlp(*inputs)
    actual = output_and_gradients(lambda *_: y, inputs)
    assert [tensor.dtype for tensor in actual] == [torch.bfloat16, x_dtype, *[torch.float32] * 4]
    for value, true in zip(actual, exact, strict=True):
        assert (value.double() - true).norm() < 2e-2 * true.norm()


@pytest.mark.usefixtures("kernels_on_cpu")
def test_bias_gradients_are_summed_in_float32():
    inputs = random_inputs(x_dtype=torch.bfloat16)
    y = mlp(*inputs)
    d_y = torch.rand(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    (d_b_out,) = torch.autograd.grad(y, inputs[4:], d_y)
    torch.testing.assert_close(d_b_out, d_y.float().sum((0, 1)))


@pytest.mark.usefixtures("kernels_on_cpu")
@pytest.mark.parametrize(
    ("frozen", "num_products"), [("", 4), ("x", 3), ("w_in w_out", 2), ("b_in b_out", 4), ("x w_in b_in", 2)]
)
def test_gradients_of_frozen_inputs_take_no_matrix_product(monkeypatch, frozen, num_products):
    y = mlp(*random_inputs(frozen))
    products = []
    monkeypatch.setattr(matmul, "_compute", lambda *operands: products.append(operands))  # PyTorch computes it
    y.sum().backward()
    assert len(products) == num_products


@pytest.mark.usefixtures("kernels_on_cpu")
@pytest.mark.parametrize(
    ("frozen", "rows"),
    [
        ("", [(18, 8), (18, 32), (18, 32)]),
        ("w_in", [(18, 32), (18, 32)]),
        ("w_in w_out", [(18, 32)]),
    ],
)
def test_only_what_the_backward_pass_reads_is_saved_in_the_dtype_of_autocast(frozen, rows):
    saved = []
    inputs = random_inputs(frozen)
    weights = {weight.data_ptr() for weight in inputs[1:]}
    save = torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x)
    with save, torch.autocast("cpu", torch.bfloat16):
        mlp(*inputs)
    activations = [x for x in saved if x.data_ptr() not in weights]
    assert sorted(tuple(x.shape) for x in activations) == rows
    assert {x.dtype for x in activations} == {torch.bfloat16}


@pytest.mark.usefixtures("kernels_on_cpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_custom_operators_pass_opcheck(dtype):
    d_y, w_out, pre_gelu = torch.ones(3, 5, dtype=dtype), torch.ones(5, 20), torch.ones(3, 20, dtype=dtype)
    torch.library.opcheck(torch.ops.homebrew.mlp_backward.default, (d_y, w_out, pre_gelu))
    inputs = [torch.ones(shape).requires_grad_() for shape in ((3, 5), (20, 5), (20,), (5, 20), (5,))]
    torch.library.opcheck(torch.ops.homebrew.mlp.default, inputs)


@pytest.mark.usefixtures("kernels_on_cpu")
@pytest.mark.parametrize("frozen", ["", "w_in b_in w_out b_out", "x w_in b_in"])
def test_the_compiled_mlp_matches_the_eager_one(frozen):
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    expected = output_and_gradients(mlp, random_inputs(frozen, torch.bfloat16))
    actual = output_and_gradients(compiled, random_inputs(frozen, torch.bfloat16))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("kernels_on_cpu")
def test_dynamic_shapes_share_one_graph():
    weights, backend = random_inputs()[1:], CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(mlp, fullgraph=True, dynamic=True, backend=backend)
    for length in (5, 7, 9):
        x = torch.randn(2, length, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
        y = compiled(x, *weights)
        y.sum().backward()
        torch.testing.assert_close(y, mlp(x, *weights))
    assert backend.frame_count == 1


@pytest.mark.usefixtures("kernels_on_cpu")
def test_the_output_is_contiguous_whatever_the_layout_of_the_input():
    """Matrix products write contiguous outputs."""
    _, *weights = random_inputs()
    x = torch.randn(1, 8, 9, generator=torch.Generator().manual_seed(0)).mT
    y = mlp(x, *weights)
    assert y.is_contiguous()
    torch.testing.assert_close(y, reference(x, *weights))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("frozen", ["", "w_in b_in w_out b_out", "x w_in b_in"])
def test_a_gpu_computes_the_same(compiled, frozen):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 33, 16), (64, 16), (64,), (16, 64), (16,)]
    inputs = [torch.randn(shape, generator=generator).cuda() for shape in shapes]
    for name, tensor in zip(NAMES, inputs, strict=True):
        tensor.requires_grad = name not in frozen.split()
    expected = output_and_gradients(reference, [x.detach().double().requires_grad_(x.requires_grad) for x in inputs])
    fused = torch.compile(mlp, fullgraph=True) if compiled else mlp
    with torch.autocast("cuda", torch.bfloat16):
        y = fused(*inputs)
    for actual, true in zip(output_and_gradients(lambda *_: y, inputs), expected, strict=True):
        assert (actual.double() - true).norm() < 2e-2 * true.norm()
