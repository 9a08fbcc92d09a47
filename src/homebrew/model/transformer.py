"""The transformer of GPT-2: attention, MLP, blocks and embeddings.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners": pre-norm blocks, learned position
embeddings, tanh GELU. Modules and parameters have the same names as in Hugging Face's GPT-2.

Dimensions: B batch size, T sequence length, C embedding dimension (`n_embd`), nh number of heads, hs head size
(C / nh).
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from homebrew.model.gpt_config import GPTConfig
from homebrew.model.lora import LoRALinear
from homebrew.model.ops.attention import self_attention
from homebrew.model.ops.autocast import compute_dtype
from homebrew.model.ops.linear import apply_linear, is_plain
from homebrew.model.ops.mlp import mlp

if TYPE_CHECKING:
    from homebrew.generation.kv_cache import KeyValueCache, LayerCache


class CausalSelfAttention(nn.Module):
    """Multi-head self-attention in which each position attends to itself and earlier positions."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, cache: "LayerCache | None" = None) -> Tensor:
        """Apply attention.

        Args:
            x: Hidden states, (B, T, C).
            cache: Keys and values of earlier tokens, which the new tokens also attend to. Updated in place.
        """
        B, T, C = x.shape
        qkv = apply_linear(self.c_attn, x).view(B, T, 3, self.n_head, C // self.n_head)
        if cache is None:
            y = self_attention(qkv, dropout=self.dropout, training=self.training)  # (B, T, nh, hs)
        else:
            y = cache.attend(*(x.transpose(1, 2) for x in qkv.unbind(2))).transpose(1, 2)
        return F.dropout(apply_linear(self.c_proj, y.reshape(B, T, C)), self.dropout, self.training)


class MLP(nn.Module):
    """Two linear layers with a tanh GELU between them. The hidden layer is 4·C wide."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        if is_plain(self.c_fc) and is_plain(self.c_proj):
            x = mlp(x, self.c_fc.weight, self.c_fc.bias, self.c_proj.weight, self.c_proj.bias)
        elif isinstance(self.c_proj, LoRALinear) and self.training and torch.is_grad_enabled():
            # A LoRA layer saves its input for the backward pass. For c_proj that is the widest activation of the
            # model, and recomputing the GELU is cheap.
            x = checkpoint(self._gelu_and_project, self.c_fc(x), use_reentrant=False)
        else:
            x = self._gelu_and_project(self.c_fc(x))
        return F.dropout(x, self.dropout, self.training)

    def _gelu_and_project(self, x: Tensor) -> Tensor:
        y: Tensor = self.c_proj(F.gelu(x, approximate="tanh"))
        return y


class Block(nn.Module):
    """A pre-norm transformer block: attention and MLP, each added to the residual stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.activation_checkpointing = False
        """Whether to save only the block's input and recompute the rest in the backward pass (Chen et al. 2016)."""
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: "LayerCache | None" = None) -> Tensor:
        """Map (B, T, C) to (B, T, C). `cache` is as in `CausalSelfAttention`."""
        if self.activation_checkpointing and self.training:
            output: Tensor = checkpoint(self._forward, x, None, use_reentrant=False)
            return output
        return self._forward(x, cache)

    def _forward(self, x: Tensor, cache: "LayerCache | None") -> Tensor:
        x = x + self.attn(self.ln_1(x), cache)
        x = x + self.mlp(self.ln_2(x))
        return x


class Transformer(nn.Module):
    """GPT-2 without its head: token and position embeddings, blocks and a final layer norm."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)

    def set_dropout(self, dropout: float) -> None:
        """Set the dropout of the embeddings and all blocks."""
        for module in self.modules():
            if isinstance(module, Transformer | CausalSelfAttention | MLP):
                module.dropout = dropout

    def forward(self, input_ids: Tensor, cache: "KeyValueCache | None" = None) -> Tensor:
        """Compute the final hidden states.

        Args:
            input_ids: Token ids, (B, T), int64.
            cache: Keys and values of earlier tokens, which the new tokens also attend to. Updated in place.

        Returns:
            Hidden states, (B, T, C).
        """
        positions = torch.arange(input_ids.shape[1], device=input_ids.device) if cache is None else cache.positions
        x: Tensor = self.wte(input_ids) + self.wpe(positions)  # (B, T, C)
        # Under bfloat16 autocast the residual stream is bfloat16 too, which halves the bytes that every norm and
        # every residual addition reads and writes.
        x = x.to(compute_dtype(x))
        x = F.dropout(x, self.dropout, self.training)
        for index, block in enumerate(self.h):
            # With a cache, a compiled block runs uncompiled: otherwise each new prompt or cache length is compiled.
            x = block(x, None) if cache is None else block._call_impl(x, cache.layer(index))  # type: ignore[no-untyped-call]
        hidden: Tensor = self.ln_f(x)
        return hidden
