"""The key-value cache: what attention has computed for the tokens already read.

Pope et al. 2022, "Efficiently Scaling Transformer Inference". Its buffers have one size and one place for a
whole generation, and positions are tensors, so that a CUDA graph or a compiled kernel reads token after token
without the host taking part.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from homebrew.model.gpt_config import GPTConfig


class LayerCache(NamedTuple):
    """One layer's part of a `KeyValueCache`."""

    keys: Tensor
    values: Tensor
    slots: Tensor
    mask: Tensor

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store the new keys and values, then attend to all that are visible; (B, nh, T, hs) each."""
        self.keys.index_copy_(2, self.slots, k.to(self.keys.dtype))
        self.values.index_copy_(2, self.slots, v.to(self.values.dtype))
        return F.scaled_dot_product_attention(q.to(self.keys.dtype), self.keys, self.values, attn_mask=self.mask)


class KeyValueCache:
    """The keys and values of tokens already read, in buffers that never move.

    A sequence occupies the slots from its `start` on: the sequences of a batch end at the same slot, so the
    shorter ones start later.

    Args:
        config: the model's shape.
        batch_size: sequences, B.
        length: slots, L.
        device: where the model is.
        dtype: of the model's weights.
    """

    def __init__(
        self, config: GPTConfig, batch_size: int, length: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        # Each layer's in tensors of its own: of a part of one for all, a compiled step would write all anew.
        shape = (batch_size, config.n_head, length, config.n_embd // config.n_head)
        self.keys, self.values = (
            [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)] for _ in range(2)
        )
        self.start = torch.zeros(batch_size, 1, device=device, dtype=torch.int64)
        self.move_to(torch.zeros(1, device=device, dtype=torch.int64))

    def move_to(self, slots: Tensor) -> None:
        """Say where the tokens read next are to be stored.

        Args:
            slots: (T,), int64, consecutive.
        """
        every = torch.arange(self.keys[0].shape[2], device=slots.device)  # (L,)
        here = every == slots[:, None]  # (T, L); padding before a start sees itself, or its softmax is 0 / 0
        visible = (every <= slots[:, None]) & (every >= self.start[:, :, None])  # (B, T, L)
        self.slots = slots
        # Added to the scores: every layer would make this of a mask of truth values, in kernels of its own.
        unseen = ~(visible | here)[:, None]
        self.mask = torch.zeros_like(unseen, dtype=self.keys[0].dtype).masked_fill_(unseen, -torch.inf)  # (B, 1, T, L)
        self.positions = (slots - self.start).clamp(min=0)  # (B, T)

    def layer(self, index: int) -> LayerCache:
        """What the attention of layer `index` needs."""
        return LayerCache(self.keys[index], self.values[index], self.slots, self.mask)
