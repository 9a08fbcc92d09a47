"""Matrix products with the fastest of cuBLASLt's algorithms.

PyTorch uses the algorithm that cuBLASLt's heuristic ranks first. For many of GPT-2's shapes, another of the first eight
algorithms is faster, by up to a sixth on an H200. When a shape first occurs, the algorithms are timed, as in cuDNN's
benchmark mode for convolutions.
"""

import math
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from homebrew.model.ops.cublaslt import Algorithm, Layout, Product, is_available

_ROUNDS = 5
"""Number of times that each algorithm is timed. The shortest time counts."""

_MAX_PRODUCTS = 256
"""Maximum number of products to tune. GPT-2 needs about 20. With ever new shapes, tuning costs more than it saves."""

_products: dict[Hashable, "_TunedProduct | None"] = {}
"""Products by the layout, dtype and device of their operands. None: cuBLASLt has no algorithm."""


@torch.library.custom_op("homebrew::matmul", mutates_args=(), tags=(torch.Tag.flexible_layout,))
def matmul(a: Tensor, b: Tensor, transpose_a: bool = False) -> Tensor:
    """Compute a @ b, or a.T @ b. Not differentiable.

    There is a flag because `torch.compile` copies transposed matrices that are passed to a custom operator.

    Args:
        a: Matrix, (n, k), or (k, n) if `transpose_a`.
        b: Matrix, (k, m), of the same dtype.
        transpose_a: Whether to transpose `a`.

    Returns:
        The product, (n, m), of the same dtype.
    """
    a = a.T if transpose_a else a
    return matmul_into(a.new_empty(a.shape[0], b.shape[1]), a, b)


@matmul.register_fake
def _(a: Tensor, b: Tensor, transpose_a: bool = False) -> Tensor:
    return a.new_empty(a.shape[1] if transpose_a else a.shape[0], b.shape[1])


def matmul_into(out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Write a @ b, or a @ b + bias, into `out`, and return it.

    Args:
        out: Matrix, (n, m), contiguous.
        a: Matrix, (n, k), of the same dtype. It may be transposed, as in `x.T`.
        b: Matrix, (k, m), of the same dtype. It may be transposed, too.
        bias: Vector to add to each row, (m,), of the same dtype.
    """
    product = _product_for(a, b, with_bias=bias is not None)
    if product is None:
        return torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)
    with torch.cuda.device_of(out):  # type: ignore[no-untyped-call]
        product.run(a, b, out, bias)
    return out


def is_tunable(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether products of this dtype use the fastest algorithm.

    Two processes may find different algorithms, so PyTorch is used if deterministic algorithms are required.
    """
    is_half = dtype in (torch.float16, torch.bfloat16)
    return device.type == "cuda" and is_half and not torch.are_deterministic_algorithms_enabled()


def _product_for(a: Tensor, b: Tensor, *, with_bias: bool) -> "_TunedProduct | None":
    """Return the product for operands like these, or None if PyTorch has to compute it."""
    if not (is_tunable(a.device, a.dtype) and is_available()):
        return None
    a_layout, b_layout = Layout.of(a), Layout.of(b)
    if a_layout is None or b_layout is None:
        return None
    key = (a_layout, b_layout, a.dtype, a.device, with_bias)
    if key not in _products and len(_products) < _MAX_PRODUCTS:
        with torch.cuda.device(a.device):
            product = _TunedProduct(a_layout, b_layout, a.dtype, with_bias=with_bias)
        _products[key] = product if product.algorithms else None
    return _products.get(key)


class _TunedProduct:
    """A product that times its algorithms in the first call, and then uses the fastest."""

    def __init__(self, a: Layout, b: Layout, dtype: torch.dtype, *, with_bias: bool) -> None:
        self.product = Product(a, b, dtype, with_bias=with_bias)
        self.algorithms = self.product.find_algorithms()
        self.fastest: Algorithm | None = None

    def run(self, a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None) -> None:
        """Write the product into `out` on the current stream."""
        if self.fastest is None and not torch.cuda.is_current_stream_capturing():  # a capture cannot be timed
            self.fastest = self._find_fastest(a, b, out, bias)
        self.product.run(self.fastest or self.algorithms[0], a, b, out, bias)

    def _find_fastest(self, *operands: Any) -> Algorithm:  # noqa: ANN401 - those of `run`
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        milliseconds = [math.inf] * len(self.algorithms)
        for _ in range(_ROUNDS):
            for index, algorithm in enumerate(self.algorithms):
                start.record()
                self.product.run(algorithm, *operands)
                end.record()
                end.synchronize()
                milliseconds[index] = min(milliseconds[index], start.elapsed_time(end))
        return self.algorithms[milliseconds.index(min(milliseconds))]
