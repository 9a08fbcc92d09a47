"""Operations of the model. Each is faster or needs less memory than plain PyTorch, and computes the same result.

- `attention`: causal attention for training. It selects the fastest backend of PyTorch's scaled dot-product
  attention (Dao et al. 2022, "FlashAttention"), or matrix products for short bfloat16 sequences on a CPU.
- `cudnn_attention`: cuDNN's attention with one gradient for queries, keys and values, which saves a copy. Used on
  Hopper GPUs if `nvidia-cudnn-frontend` is installed.
- `chunked_loss`: the language-model head with its cross-entropy loss, a chunk of tokens at a time. The logits of
  all tokens would be the largest tensor of a training step, but never exist at once (as in llm.c's fused classifier
  and Hsu et al. 2024, "Liger Kernel").
- `linear`: the linear layers of attention.
- `mlp`: the MLP, whose matrix products also compute the GELU and its gradient (Hendrycks and Gimpel 2016, "Gaussian
  Error Linear Units").
- `matmul`: matrix products on an NVIDIA GPU, with the fastest algorithm of `cublaslt`, which binds NVIDIA's library.
- `triton_kernels`: a CUDA kernel that computes softmax, loss and gradient of the logits (Milakov and Gimelshein 2018,
  "Online normalizer calculation for softmax"). Without a GPU or Triton, plain PyTorch is used.
- `autocast`: the dtype that autocast selects.
"""

import importlib.util

from torch import Tensor

_HAS_TRITON = importlib.util.find_spec("triton") is not None


def uses_triton(x: Tensor) -> bool:
    """Return whether operations on `x` use Triton kernels, which need a GPU. This function does not import Triton."""
    return x.is_cuda and _HAS_TRITON
