"""cuDNN's attention, with the gradients of queries, keys and values written into one tensor.

PyTorch's cuDNN attention returns these gradients as three tensors, and concatenating them takes 1.6 % of a training
step of GPT-2 small. cuDNN can write them where the linear layer before reads them, but only its own Python package,
`nvidia-cudnn-frontend`, lets a program say so.
"""

from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

HOPPER = (9, 0)
"""Compute capability of the GPUs on which this was tested and measured. Others use PyTorch's attention."""

MIN_LENGTH = 64
"""Shorter sequences use PyTorch's attention, because cuDNN does not support all of them."""


def uses_cudnn(qkv: Tensor) -> bool:
    """Return whether `cudnn_attention` supports this input, on its device.

    It is not used if deterministic algorithms are required, because the backward pass adds in an order that varies.
    """
    _, T, _, _, hs = qkv.shape
    is_half = qkv.dtype in (torch.float16, torch.bfloat16)
    is_supported = qkv.is_cuda and is_half and T >= MIN_LENGTH and hs % 8 == 0 and hs <= 128
    return is_supported and not torch.are_deterministic_algorithms_enabled() and is_available(qkv.device.index)


def is_available(device_index: int) -> bool:
    """Return whether cuDNN can compute the backward pass on a GPU. `torch.compile` does not trace this function."""
    return _can_build_plan(device_index)


# This is what torch.compiler.assume_constant_result does, which would import all of torch.compile.
is_available._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _can_build_plan(device_index: int) -> bool:
    if torch.cuda.get_device_capability(device_index) != HOPPER:
        return False
    try:
        with torch.cuda.device(device_index):
            _backward_plan((1, MIN_LENGTH, 3, 1, 64), torch.bfloat16, device_index)
    except Exception:  # the package is not installed, or made for another version of cuDNN
        return False
    return True


def cudnn_attention(qkv: Tensor) -> Tensor:
    """Compute attention in which each position attends to itself and earlier positions.

    Args:
        qkv: Queries, keys and values, (B, T, 3, nh, hs), float16 or bfloat16.

    Returns:
        Tensor of shape (B, T, nh, hs), in the same dtype.
    """
    y: Tensor = _attention(qkv)[0]
    return y


@torch.library.custom_op("homebrew::attention", mutates_args=(), tags=(torch.Tag.flexible_layout,))
def _attention(qkv: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the output (B, T, nh, hs), and the logarithm of each softmax's denominator, (B, nh, T, 1), float32."""
    y, log_sum_exp = _forward(*_heads(qkv.contiguous()))
    return y.transpose(1, 2).contiguous(), log_sum_exp


@_attention.register_fake
def _(qkv: Tensor) -> tuple[Tensor, Tensor]:
    B, T, _, nh, hs = qkv.shape
    return qkv.new_empty(B, T, nh, hs), qkv.new_empty(B, nh, T, 1, dtype=torch.float32)


@torch.library.custom_op("homebrew::attention_backward", mutates_args=(), tags=(torch.Tag.flexible_layout,))
def _attention_backward(d_y: Tensor, qkv: Tensor, y: Tensor, log_sum_exp: Tensor) -> Tensor:
    d_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    with torch.cuda.device_of(qkv):  # type: ignore[no-untyped-call]
        plan = _backward_plan(tuple(qkv.shape), qkv.dtype, qkv.device.index)
        y, d_y = (x.contiguous().transpose(1, 2) for x in (y, d_y))
        plan.run(*_heads(qkv.contiguous()), y, d_y, log_sum_exp, *_heads(d_qkv))
    return d_qkv


@_attention_backward.register_fake
def _(_d_y: Tensor, qkv: Tensor, _y: Tensor, _log_sum_exp: Tensor) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    attend = torch.ops.aten._scaled_dot_product_cudnn_attention
    y, log_sum_exp, *_ = attend(q, k, v, attn_bias=None, compute_log_sumexp=True, is_causal=True)
    return y, log_sum_exp


def _heads(qkv: Tensor) -> list[Tensor]:
    """Return queries, keys and values as views, (B, nh, T, hs) each."""
    return [x.transpose(1, 2) for x in qkv.unbind(2)]


class _BackwardPlan:
    """cuDNN's plan of the backward pass, for queries, keys and values of a given shape and dtype."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, handle: int) -> None:
        import cudnn

        B, T, _, nh, hs = shape
        half = cudnn.data_type.BFLOAT16 if dtype == torch.bfloat16 else cudnn.data_type.HALF
        single = cudnn.data_type.FLOAT
        graph = cudnn.pygraph(handle=handle, io_data_type=half, intermediate_data_type=single, compute_data_type=single)
        sizes = [B, nh, T, hs]
        packed, separate = [T * 3 * nh * hs, hs, 3 * nh * hs, 1], [T * nh * hs, hs, nh * hs, 1]
        inputs = [
            *(graph.tensor(name=name, dim=sizes, stride=packed, data_type=half) for name in ("q", "k", "v")),
            *(graph.tensor(name=name, dim=sizes, stride=separate, data_type=half) for name in ("y", "d_y")),
            graph.tensor(name="log_sum_exp", dim=[B, nh, T, 1], stride=[nh * T, T, 1, 1], data_type=single),
        ]
        causal = {"diagonal_alignment": cudnn.diagonal_alignment.TOP_LEFT, "diagonal_band_right_bound": 0}
        outputs = graph.sdpa_backward(*inputs, attn_scale=hs**-0.5, **causal)
        for output in outputs:
            output.set_output(True).set_dim(sizes).set_stride(packed).set_data_type(half)
        graph.build([cudnn.heur_mode.A])
        self._graph, self._handle, self._set_stream = graph, handle, cudnn.set_stream
        self._tensor_ids = [tensor.get_uid() for tensor in (*inputs, *outputs)]
        self._workspace_bytes: int = graph.get_workspace_size()

    def run(self, *operands: Tensor) -> None:
        """Compute the gradients on the current stream.

        Args:
            operands: q, k, v, y, d_y, log_sum_exp, and the gradients of q, k and v, which are written.
        """
        workspace = torch.empty(self._workspace_bytes, dtype=torch.uint8, device=operands[0].device)
        self._set_stream(handle=self._handle, stream=torch.cuda.current_stream().cuda_stream)
        pointers = {key: x.data_ptr() for key, x in zip(self._tensor_ids, operands, strict=True)}
        self._graph.execute(pointers, workspace.data_ptr(), handle=self._handle)


@lru_cache(maxsize=1024)
def _backward_plan(shape: tuple[int, ...], dtype: torch.dtype, device_index: int) -> _BackwardPlan:
    """Return the plan for a shape (B, T, 3, nh, hs) on the current device."""
    return _BackwardPlan(shape, dtype, _handle(device_index))


@cache
def _handle(_device_index: int) -> int:
    """Return cuDNN's handle for the current device."""
    import cudnn

    handle: int = cudnn.create_handle()
    return handle


def _setup_context(
    ctx: Any,  # noqa: ANN401 - autograd's context
    inputs: tuple[Tensor],
    output: tuple[Tensor, Tensor],
) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_y: Tensor, _: None) -> Tensor:  # noqa: ANN401 - autograd's context
    d_qkv: Tensor = _attention_backward(d_y, *ctx.saved_tensors)
    return d_qkv


_attention.register_autograd(_backward, setup_context=_setup_context)
