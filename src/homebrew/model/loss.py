"""The language-model head and its loss."""

from torch import Tensor
from torch.nn import functional as F

IGNORE_INDEX = -100
"""A target with this value is not scored (PyTorch's and Hugging Face's convention)."""


def head_loss(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Mean cross entropy of the next token, over the targets that are scored.

    Args:
        hidden: the last layer's output, (B, T, C), any float dtype.
        weight: the head's rows, one a token id, (padded V, C); rows from `vocab_size` on are padding.
        targets: the next token's ids, (B, T), int64; `IGNORE_INDEX` is not scored.
        vocab_size: ids that exist; the padding's logits take no part in the softmax.

    Returns:
        The mean in nats, a float32 scalar; 0 where no target is scored.
    """
    logits = F.linear(hidden.flatten(0, 1), weight)[:, :vocab_size].float()  # (B·T, V)
    total = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    return total / (targets != IGNORE_INDEX).sum().clamp(min=1)
