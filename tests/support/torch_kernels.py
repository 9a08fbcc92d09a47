"""The functions of `homebrew.model.ops.triton_kernels` in plain PyTorch, to test their callers on a CPU; not a test."""

import torch
from torch.nn import functional as F


def cross_entropy_inplace(logits, targets, vocab_size, with_gradient, ignore_index):
    values = logits[:, :vocab_size].to(torch.float32, copy=True)
    total = F.cross_entropy(values, targets, ignore_index=ignore_index, reduction="sum")
    if with_gradient:
        is_scored = targets != ignore_index
        logits.zero_()
        logits[is_scored, :vocab_size] = values[is_scored].softmax(-1).to(logits.dtype)
        logits[is_scored, targets[is_scored]] -= 1.0
    return total
