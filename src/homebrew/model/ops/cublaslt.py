"""Bindings to cuBLASLt, NVIDIA's library of matrix products, which comes with PyTorch.

PyTorch's matrix products use cuBLASLt too, but with the algorithm that its heuristic ranks first. Names and numbers
below are those of NVIDIA's header `cublasLt.h`.
"""

import ctypes
from ctypes import byref, c_float, c_int, c_int64, c_size_t, c_uint32, c_uint64, c_void_p, sizeof
from enum import IntEnum
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

WORKSPACE_BYTES = 32 * 2**20
"""Maximum workspace memory of an algorithm."""

MAX_ALGORITHMS = 8
"""Number of algorithms to request from the heuristic."""

ALIGNMENT = 16
"""Alignment in bytes of the first element and of the rows of every operand."""

_DTYPES = {torch.float16: 2, torch.bfloat16: 14}  # cudaDataType: CUDA_R_16F, CUDA_R_16BF
_FLOAT32, _COMPUTE_FLOAT32 = 0, 68
_DESC_TRANSA, _DESC_TRANSB, _DESC_EPILOGUE, _DESC_BIAS_POINTER = 3, 4, 7, 8  # cublasLtMatmulDescAttributes_t
_DESC_EPILOGUE_AUX_POINTER, _DESC_EPILOGUE_AUX_LD = 11, 12
_PREF_MAX_WORKSPACE_BYTES, _PREF_MIN_ALIGNMENTS = 1, (5, 6, 7, 8)  # alignments of A, B, C and D


class Epilogue(IntEnum):
    """Operation on a product before it is written, cublasLtEpilogue_t. Some operations use a vector and a matrix."""

    NOTHING = 1
    ADD_BIAS = 4
    """Add the vector to each row."""
    GELU = 164
    """Add the vector to each row, write the sum into the matrix, and apply the tanh GELU."""
    GELU_GRADIENT = 192
    """Multiply with the derivative of the tanh GELU at the values of the matrix."""


class Algorithm(ctypes.Structure):
    """Result of the heuristic, cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        ("algo", c_uint64 * 8),
        ("workspace_bytes", c_size_t),
        ("state", c_int),
        ("waves_count", c_float),
        ("reserved", c_int * 4),
    )


class Layout(NamedTuple):
    """A matrix in memory whose rows, or whose columns if `transposed`, are `stride` elements apart."""

    rows: int
    columns: int
    stride: int
    transposed: bool

    @classmethod
    def of(cls, x: Tensor) -> "Layout | None":
        """Return the layout of a matrix, or None if it cannot be an operand."""
        step = x.element_size()
        for transposed in (False, True):
            outer, inner = x.stride()[::-1] if transposed else x.stride()
            width = x.shape[0] if transposed else x.shape[1]
            is_aligned = outer * step % ALIGNMENT == x.data_ptr() % ALIGNMENT == 0
            if inner == 1 and outer >= width and is_aligned and x.numel():
                return cls(x.shape[0], x.shape[1], outer, transposed)
        return None


class Product:
    """A matrix product out = a @ b of given layouts, with an epilogue.

    cuBLASLt's matrices are column-major: it sees `out` as its transpose, bᵀ @ aᵀ. Therefore `b` is the first operand.
    """

    def __init__(self, a: Layout, b: Layout, dtype: torch.dtype, epilogue: Epilogue) -> None:
        """Describe the product to cuBLASLt."""
        self._description = c_void_p()
        _call("MatmulDescCreate", byref(self._description), c_int(_COMPUTE_FLOAT32), c_int(_FLOAT32))
        self._describe(_DESC_TRANSA, c_int(b.transposed))
        self._describe(_DESC_TRANSB, c_int(a.transposed))
        self._describe(_DESC_EPILOGUE, c_uint32(epilogue))
        if epilogue in (Epilogue.GELU, Epilogue.GELU_GRADIENT):
            self._describe(_DESC_EPILOGUE_AUX_LD, c_int64(b.columns))
        self._a, self._b = (_layout(x, dtype) for x in (a, b))
        self._out = _layout(Layout(a.rows, b.columns, b.columns, transposed=False), dtype)

    def run(
        self, algorithm: Algorithm, a: Tensor, b: Tensor, out: Tensor, vector: Tensor | None, matrix: Tensor | None
    ) -> None:
        """Write the product into `out` on the current stream. Vector and matrix are those of the epilogue."""
        if vector is not None:
            self._describe(_DESC_BIAS_POINTER, c_void_p(vector.data_ptr()))
        if matrix is not None:
            self._describe(_DESC_EPILOGUE_AUX_POINTER, c_void_p(matrix.data_ptr()))
        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=out.device)
        one, zero = byref(c_float(1)), byref(c_float(0))  # out = 1 · a @ b + 0 · out
        a_data, b_data, out_data, workspace_data = (c_void_p(x.data_ptr()) for x in (a, b, out, workspace))
        a_operand, b_operand, out_operand = (b_data, self._b), (a_data, self._a), (out_data, self._out)
        _call(
            "Matmul",
            *(_handle(), self._description, one, *a_operand, *b_operand, zero, *out_operand, *out_operand),
            *(byref(algorithm), workspace_data, c_size_t(WORKSPACE_BYTES)),
            c_void_p(torch.cuda.current_stream().cuda_stream),
        )

    def _describe(self, attribute: int, value: "c_int | c_int64 | c_uint32 | c_void_p") -> None:
        _call("MatmulDescSetAttribute", self._description, c_int(attribute), byref(value), c_size_t(sizeof(value)))

    def find_algorithms(self) -> list[Algorithm]:
        """Return the algorithms that the heuristic proposes for the current device, ordered by expected speed."""
        preference, found = c_void_p(), (Algorithm * MAX_ALGORITHMS)()
        _call("MatmulPreferenceCreate", byref(preference))
        values = {_PREF_MAX_WORKSPACE_BYTES: c_size_t(WORKSPACE_BYTES)}
        values |= dict.fromkeys(_PREF_MIN_ALIGNMENTS, c_uint32(ALIGNMENT))  # type: ignore[arg-type]
        for attribute, value in values.items():
            size = c_size_t(sizeof(value))
            _call("MatmulPreferenceSetAttribute", preference, c_int(attribute), byref(value), size)
        count = c_int()
        operands = (self._b, self._a, self._out, self._out)
        status = _library().cublasLtMatmulAlgoGetHeuristic(
            *(_handle(), self._description, *operands, preference), c_int(MAX_ALGORITHMS), found, byref(count)
        )
        _call("MatmulPreferenceDestroy", preference)
        return [] if status else [algorithm for algorithm in found[: count.value] if algorithm.state == 0]


def is_available() -> bool:
    """Return whether PyTorch was built for CUDA and cuBLASLt is found. `torch.compile` does not trace this function."""
    return _can_load()


# This is what torch.compiler.assume_constant_result does, which would import all of torch.compile.
is_available._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _can_load() -> bool:
    try:
        _library()
    except OSError:
        return False
    return True


def _layout(x: Layout, dtype: torch.dtype) -> c_void_p:
    """Describe a matrix to cuBLASLt. A row-major matrix is described as its column-major transpose."""
    rows, columns = (x.rows, x.columns) if x.transposed else (x.columns, x.rows)
    layout = c_void_p()
    sizes = (c_uint64(rows), c_uint64(columns), c_int64(x.stride))
    _call("MatrixLayoutCreate", byref(layout), c_int(_DTYPES[dtype]), *sizes)
    return layout


def _call(function: str, *arguments: object) -> None:
    status = getattr(_library(), f"cublasLt{function}")(*arguments)
    if status:
        raise RuntimeError(f"cublasLt{function} returned the status {status}.")


@cache
def _library() -> ctypes.CDLL:
    """Return the cuBLASLt library that PyTorch has loaded."""
    if torch.version.cuda is None:
        raise OSError("PyTorch was not built for CUDA.")
    return ctypes.CDLL(f"libcublasLt.so.{torch.version.cuda.partition('.')[0]}")


def _handle() -> c_void_p:
    """Return the current device's cuBLAS handle, which is also a cuBLASLt handle."""
    return c_void_p(torch.cuda.current_blas_handle())  # type: ignore[no-untyped-call]
