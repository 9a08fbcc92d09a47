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

from homebrew.model.ops.cublaslt import ALIGNMENT, Algorithm, Epilogue, Layout, Product, is_available

_ROUNDS = 5
"""Number of times that each algorithm is timed. The shortest time counts."""

_MAX_PRODUCTS = 256
"""Maximum number of products to tune. GPT-2 needs about 20. With ever new shapes, tuning costs more than it saves."""

_products: dict[Hashable, "_TunedProduct | None"] = {}
"""Products by the layout, dtype and device of their operands. None: cuBLASLt has no algorithm."""


def matmul_into(out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Write a @ b, or a @ b + bias, into `out`, and return it.

    Args:
        out: Matrix, (n, m), contiguous.
        a: Matrix, (n, k), of the same dtype. It may be transposed, as in `x.T`.
        b: Matrix, (k, m), of the same dtype. It may be transposed, too.
        bias: Vector to add to each row, (m,), of the same dtype.
    """
    if not _compute(out, a, b, Epilogue.NOTHING if bias is None else Epilogue.ADD_BIAS, bias):
        return torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)
    return out


def matmul_gelu_into(out: Tensor, pre_gelu: Tensor, a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
    """Write a @ b + bias into `pre_gelu` and its tanh GELU into `out`, and return `out`.

    `pre_gelu` is a contiguous matrix, (n, m), of the same dtype. The other arguments are as in `matmul_into`.
    """
    if not _compute(out, a, b, Epilogue.GELU, bias, pre_gelu):
        torch.ops.aten.gelu.out(torch.addmm(bias, a, b, out=pre_gelu), approximate="tanh", out=out)
    return out


def matmul_gelu_backward_into(out: Tensor, a: Tensor, b: Tensor, pre_gelu: Tensor) -> Tensor:
    """Write the gradient for `pre_gelu` into `out`, and return it.

    The product a @ b is the gradient for the tanh GELU of `pre_gelu`. The arguments are as in `matmul_gelu_into`.
    """
    if not _compute(out, a, b, Epilogue.GELU_GRADIENT, None, pre_gelu):
        torch.ops.aten.gelu_backward.grad_input(a @ b, pre_gelu, approximate="tanh", grad_input=out)
    return out


def is_tunable(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether products of this dtype use the fastest algorithm.

    Two processes may find different algorithms, so PyTorch is used if deterministic algorithms are required.
    """
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    return not torch.are_deterministic_algorithms_enabled() and is_available()


def _compute(
    out: Tensor, a: Tensor, b: Tensor, epilogue: Epilogue, vector: Tensor | None = None, matrix: Tensor | None = None
) -> bool:
    """Compute the product if cuBLASLt can, and return whether it can."""
    if vector is not None and (not vector.is_contiguous() or vector.data_ptr() % ALIGNMENT):
        return False
    product = _product_for(a, b, epilogue)
    if product is not None:
        with torch.cuda.device_of(out):  # type: ignore[no-untyped-call]
            product.run(a, b, out, vector, matrix)
    return product is not None


def _product_for(a: Tensor, b: Tensor, epilogue: Epilogue) -> "_TunedProduct | None":
    """Return the product for operands like these, or None if PyTorch has to compute it."""
    if not is_tunable(a.device, a.dtype):
        return None
    a_layout, b_layout = Layout.of(a), Layout.of(b)
    if a_layout is None or b_layout is None:
        return None
    key = (a_layout, b_layout, a.dtype, a.device, epilogue)
    if key not in _products and len(_products) < _MAX_PRODUCTS:
        with torch.cuda.device(a.device):
            product = _TunedProduct(a_layout, b_layout, a.dtype, epilogue)
        _products[key] = product if product.algorithms else None
    return _products.get(key)


class _TunedProduct:
    """A product that times its algorithms in the first call, and then uses the fastest."""

    def __init__(self, a: Layout, b: Layout, dtype: torch.dtype, epilogue: Epilogue) -> None:
        self.product = Product(a, b, dtype, epilogue)
        self.algorithms = self.product.find_algorithms()
        self.fastest: Algorithm | None = None

    def run(self, *operands: Any) -> None:  # noqa: ANN401 - those of `Product.run`
        """Write the product on the current stream."""
        if self.fastest is None and not torch.cuda.is_current_stream_capturing():  # a capture cannot be timed
            self.fastest = self._find_fastest(*operands)
        self.product.run(self.fastest or self.algorithms[0], *operands)

    def _find_fastest(self, *operands: Any) -> Algorithm:  # noqa: ANN401
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
