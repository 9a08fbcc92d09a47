"""GPT-2 in plain PyTorch, as a baseline for homebrew's model.

Its parameters have the same names as homebrew's, so either can load the other's weights. Under autocast, the residual
stream, layer norms and loss are float32.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from homebrew import GPTConfig


class Attention(nn.Module):
    """Causal self-attention with `scaled_dot_product_attention`."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.n_head, -1).transpose(1, 2) for part in self.c_attn(x).split(C, dim=2))
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)  # (B, nh, T, hs)
        y = y.transpose(1, 2).contiguous().view(B, T, C)
        return F.dropout(self.c_proj(y), self.dropout, self.training)


class MLP(nn.Module):
    """Two linear layers with GELU."""

    def __init__(self, config: GPTConfig, gelu: str) -> None:
        super().__init__()
        self.dropout, self.gelu = config.dropout, gelu
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = self.c_proj(F.gelu(self.c_fc(x), approximate=self.gelu))
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: GPTConfig, gelu: str) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(config.n_embd), Attention(config)
        self.ln_2, self.mlp = nn.LayerNorm(config.n_embd), MLP(config, gelu)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class PlainGPT(nn.Module):
    """GPT-2 that returns its loss.

    Args:
        config: Size of the model.
        gelu: Approximation of GELU: "tanh" as in GPT-2, or "none" as in nanoGPT.
        pad_vocab: Whether the head has padding rows, as in homebrew.
        score_padding: Whether the softmax includes the padding rows, as with a vocabulary rounded up.
    """

    def __init__(
        self, config: GPTConfig, *, gelu: str = "tanh", pad_vocab: bool = True, score_padding: bool = True
    ) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.num_scored = config.padded_vocab_size if score_padding else config.vocab_size
        rows = config.padded_vocab_size if pad_vocab else config.vocab_size
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(rows, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "h": nn.ModuleList(Block(config, gelu) for _ in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, rows, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                scale = (2 * config.n_layer) ** -0.5 if name.endswith("c_proj.weight") else 1.0
                nn.init.normal_(parameter, std=0.02 * scale)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of targets (B, T) given input_ids (B, T)."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.transformer["wte"](input_ids) + self.transformer["wpe"](positions)
        x = F.dropout(x, self.dropout, self.training)
        for block in self.transformer["h"]:
            x = block(x)
        logits = self.lm_head(self.transformer["ln_f"](x))[..., : self.num_scored]  # (B, T, V)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
