"""The key-value cache: keys and values of the tokens that a model has already processed.

Pope et al. 2022, "Efficiently Scaling Transformer Inference". The buffers keep their sizes and addresses for an
entire generation, and positions are tensors. A CUDA graph or a compiled step can therefore generate every token without
values from the host.

Dimensions: B batch size, T number of new tokens, L number of cache slots, nh number of heads, hs head size.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from homebrew.model.gpt_config import GPTConfig


class LayerCache(NamedTuple):
    """One layer's view of a `KeyValueCache`."""

    keys: Tensor
    """(B, nh, L, hs)."""
    values: Tensor
    """(B, nh, L, hs)."""
    slots: Tensor
    """Slots of the new tokens, (T,), int64."""
    mask: Tensor
    """Added to the attention scores: 0 for visible slots and -inf for the others, (B, 1, T, L)."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store the new keys and values, then attend to all visible slots.

        Args:
            q: Queries of the new tokens, (B, nh, T, hs).
            k: Keys of the new tokens, (B, nh, T, hs).
            v: Values of the new tokens, (B, nh, T, hs).
        """
        self.keys.index_copy_(2, self.slots, k.to(self.keys.dtype))
        self.values.index_copy_(2, self.slots, v.to(self.values.dtype))
        return F.scaled_dot_product_attention(q.to(self.keys.dtype), self.keys, self.values, attn_mask=self.mask)


class KeyValueCache:
    """Keys and values of every layer, in preallocated buffers.

    All sequences of a batch end at the same slot, so a shorter sequence starts at a later slot. The slots before
    its start are padding, which its tokens do not attend to.

    Args:
        length: Number of slots, L.
        dtype: Dtype of the model's weights.
    """

    def __init__(
        self, config: GPTConfig, batch_size: int, length: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        # Separate tensors for each layer: a compiled step copies the full buffer when it updates a slice of it.
        shape = (batch_size, config.n_head, length, config.n_embd // config.n_head)
        self.keys, self.values = (
            [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)] for _ in range(2)
        )
        self.start = torch.zeros(batch_size, 1, device=device, dtype=torch.int64)
        """First slot of each sequence, (B, 1)."""
        self.set_slots(torch.zeros(1, device=device, dtype=torch.int64))

    def set_slots(self, slots: Tensor) -> None:
        """Set the slots that the next forward pass writes, with their positions and attention mask.

        Args:
            slots: Consecutive slots, (T,), int64.
        """
        all_slots = torch.arange(self.keys[0].shape[2], device=slots.device)  # (L,)
        # A padding slot attends to itself, since a softmax over no slots would be NaN.
        itself = all_slots == slots[:, None]  # (T, L)
        visible = (all_slots <= slots[:, None]) & (all_slots >= self.start[:, :, None])  # (B, T, L)
        self.slots = slots
        # A float mask, because with a boolean mask every layer would launch kernels to convert it.
        hidden = ~(visible | itself)[:, None]
        self.mask = torch.zeros_like(hidden, dtype=self.keys[0].dtype).masked_fill_(hidden, -torch.inf)  # (B, 1, T, L)
        self.positions = (slots - self.start).clamp(min=0)  # (B, T)

    def layer(self, index: int) -> LayerCache:
        """Return the cache of layer `index`."""
        return LayerCache(self.keys[index], self.values[index], self.slots, self.mask)
