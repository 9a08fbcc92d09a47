"""Tests of matrix products with cuBLASLt's fastest algorithm. Without a GPU, PyTorch computes them."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from homebrew.model.ops import matmul as module
from homebrew.model.ops.cublaslt import Epilogue, Layout, is_available
from homebrew.model.ops.matmul import is_tunable, matmul_gelu_backward_into, matmul_gelu_into, matmul_into

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_gpu = pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")


def random(*shape, dtype=torch.bfloat16, transposed=False):
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator).to(DEVICE, dtype)
    return x.T.contiguous().T if transposed else x


def product(a, b):
    return matmul_into(a.new_empty(a.shape[0], b.shape[1]), a, b)


def assert_is_product(actual, a, b, bias=None):
    expected = a.double() @ b.double() + (0 if bias is None else bias.double())
    assert actual.dtype == a.dtype
    assert (actual.double() - expected).norm() < 1e-2 * expected.norm()


@pytest.fixture(autouse=True)
def no_products(monkeypatch):
    """Start with no tuned products, and forget those of the test."""
    monkeypatch.setattr(module, "_products", {})


SIZES = [(64, 32, 48), (7, 5, 3), (1, 8, 16), (40, 1, 8), (64, 32, 3)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize(
    ("size", "transposed", "with_bias", "dtype"),
    [(SIZES[0], layout, True, dtype) for layout in itertools.product([False, True], repeat=2) for dtype in DTYPES]
    + [(size, (False, False), True, torch.bfloat16) for size in SIZES[1:]]
    + [(size, (True, True), True, torch.bfloat16) for size in SIZES[1:]]
    + [(size, (False, True), False, torch.bfloat16) for size in SIZES[:2]],
)
def test_products_match_pytorch(size, transposed, with_bias, dtype):
    n, k, m = size
    a, b = random(n, k, dtype=dtype, transposed=transposed[0]), random(k, m, dtype=dtype, transposed=transposed[1])
    bias = random(m, dtype=dtype) if with_bias else None
    for _ in range(2):  # the first call times the algorithms
        out = torch.full((n, m), torch.nan, device=DEVICE, dtype=dtype)
        assert matmul_into(out, a, b, bias) is out
        assert_is_product(out, a, b, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(64, 32, 48), (7, 5, 3), (40, 1, 8), (64, 32, 3)])
def test_gelu_and_its_gradient_match_pytorch(size, dtype):
    n, k, m = size
    a, b, bias = random(n, k, dtype=dtype), random(k, m, dtype=dtype, transposed=True), random(m, dtype=dtype)
    c, d = random(n, k, dtype=dtype), random(k, m, dtype=dtype)
    pre_gelu = (a.double() @ b.double() + bias.double()).requires_grad_()
    post_gelu = F.gelu(pre_gelu, approximate="tanh")
    (gradient,) = torch.autograd.grad(post_gelu, pre_gelu, c.double() @ d.double())
    for _ in range(2):  # the first call times the algorithms
        out, pre, d_pre = (torch.full((n, m), torch.nan, device=DEVICE, dtype=dtype) for _ in range(3))
        matmul_gelu_into(out, pre, a, b, bias)
        matmul_gelu_backward_into(d_pre, c, d, pre)
        for actual, expected in ((pre, pre_gelu), (out, post_gelu), (d_pre, gradient)):
            assert (actual.double() - expected).norm() < 2e-2 * expected.norm()
    if DEVICE.type == "cuda" and size == (64, 32, 48) and dtype != torch.float32:
        assert all(module._products.values())
        assert {key[-1] for key in module._products} == {Epilogue.GELU, Epilogue.GELU_GRADIENT}


@pytest.mark.parametrize("layout", ["expanded", "strided", "not aligned"])
def test_any_vector_may_be_the_bias(layout):
    bias = {"expanded": random(1).expand(48), "strided": random(96)[::2], "not aligned": random(49)[1:]}[layout]
    a, b = random(64, 32), random(32, 48)
    assert_is_product(matmul_into(torch.empty(64, 48, device=DEVICE, dtype=a.dtype), a, b, bias), a, b, bias)


def test_rows_of_a_larger_matrix():
    a, b = random(64, 40)[8:24, :32], random(32, 96)[:, 16:80]
    assert_is_product(matmul_into(torch.empty(16, 64, device=DEVICE, dtype=a.dtype), a, b), a, b)


def test_layouts():
    x = torch.zeros(6, 16, dtype=torch.bfloat16)
    assert Layout.of(x) == Layout(6, 16, 16, transposed=False)
    assert Layout.of(x.T) == Layout(16, 6, 16, transposed=True)
    assert Layout.of(x[2:4, 8:]) == Layout(2, 8, 16, transposed=False)
    assert Layout.of(x[:, 1:]) is None  # not aligned
    assert Layout.of(torch.zeros(6, 15, dtype=torch.bfloat16)) is None  # rows are not aligned
    assert Layout.of(x[:, ::2]) is None  # gaps in both directions
    assert Layout.of(x[:1].expand(6, 16)) is None  # rows overlap
    assert Layout.of(x[:0]) is None


def test_only_half_precision_on_a_gpu_is_tuned():
    assert not is_tunable(torch.device("cpu"), torch.bfloat16)
    assert not is_tunable(torch.device("cuda"), torch.float32)


def test_compiled_code_may_ask_whether_cublaslt_is_available():
    compiled = torch.compile(lambda x: x + 1 if is_available() else x + 2, fullgraph=True, backend="aot_eager")
    assert compiled(torch.zeros(1)).item() == (1 if is_available() else 2)


@needs_gpu
def test_each_kind_of_product_is_tuned_once(monkeypatch):
    timed = []
    find_fastest = module._TunedProduct._find_fastest
    monkeypatch.setattr(
        module._TunedProduct, "_find_fastest", lambda self, *a: timed.append(self) or find_fastest(self, *a)
    )
    a, b = random(64, 32), random(32, 48)
    for _ in range(3):
        product(a, b)
    assert len(timed) == 1
    product(random(32, 64).T, b)
    assert len(timed) == 2


@needs_gpu
def test_reproducible_products_are_those_of_pytorch():
    a, b = random(64, 32), random(32, 48)
    torch.use_deterministic_algorithms(mode=True)
    try:
        assert torch.equal(product(a, b), a @ b)
    finally:
        torch.use_deterministic_algorithms(mode=False)
    assert not module._products


@needs_gpu
def test_ever_new_shapes_are_left_to_pytorch(monkeypatch):
    monkeypatch.setattr(module, "_MAX_PRODUCTS", 2)
    for n in (8, 16, 24, 32):
        a, b = random(n, 32), random(32, 48)
        assert_is_product(product(a, b), a, b)
    assert len(module._products) == 2


@needs_gpu
def test_a_product_is_captured_before_it_is_tuned():
    a, b = random(64, 32), random(32, 48)
    out = torch.zeros(64, 48, device=DEVICE, dtype=a.dtype)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        matmul_into(out, a, b)
    graph.replay()
    assert_is_product(out, a, b)
