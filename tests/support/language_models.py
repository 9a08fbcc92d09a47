"""Tiny language models other than GPT: transformers', and modules written for the tests; not a test."""

import math
from types import SimpleNamespace

import torch
import transformers
from torch import nn
from torch.nn import functional as F

SIZES = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 16, "bos_token_id": 0}
SIZES |= {"eos_token_id": None}
GPT2_SIZES = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 16, "bos_token_id": 0}
GPT2_SIZES |= {"eos_token_id": None, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
BART_SIZES = {"vocab_size": 50, "d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2, "dropout": 0.0}
BART_SIZES |= {"decoder_ffn_dim": 32, "max_position_embeddings": 16, "pad_token_id": 1, "eos_token_id": None}
BART_SIZES |= {"bos_token_id": 0, "decoder_start_token_id": 2, "forced_eos_token_id": None}
MAMBA_SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "eos_token_id": None}

CONFIGS = {
    "llama": lambda **changes: transformers.LlamaConfig(**SIZES | changes),
    "qwen2": lambda **changes: transformers.Qwen2Config(**SIZES | {"tie_word_embeddings": True} | changes),
    "qwen3": lambda **changes: transformers.Qwen3Config(**SIZES | {"head_dim": 16} | changes),
    "gpt_neox": lambda **changes: transformers.GPTNeoXConfig(**SIZES | changes),
    "gpt2": lambda **changes: transformers.GPT2Config(**GPT2_SIZES | changes),
    "mixtral": lambda **changes: transformers.MixtralConfig(
        **SIZES | {"num_local_experts": 4, "output_router_logits": True} | changes
    ),
    "mamba": lambda **changes: transformers.MambaConfig(**MAMBA_SIZES | changes),
    "bart": lambda **changes: transformers.BartConfig(**BART_SIZES | changes),
}
"""Configurations of tiny models. Mixtral has a loss that balances its experts. Bart's decoder ignores shift_labels,
does not shift labels, and has parameters without gradient."""


def transformers_model(name, seed=0, **changes):
    """Return a tiny causal language model of transformers with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.AutoModelForCausalLM.from_config(CONFIGS[name](**changes))


class Block(nn.Module):
    def __init__(self, width, dropout):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.Linear(width, 3 * width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        q, k, v = self.attention(self.norm(x)).chunk(3, dim=-1)
        x = x + self.dropout(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return x + self.mlp(x)


class NanoGPT(nn.Module):
    """A model with the interface of nanoGPT's: it returns `(logits, loss)`, ignores -1 and has a tied head."""

    ignore_index = -1

    def __init__(self, seed=0, dropout=0.0, vocab_size=50, block_size=16):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=vocab_size, block_size=block_size)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.wte, self.wpe = nn.Embedding(vocab_size, 32), nn.Embedding(block_size, 32)
            self.h = nn.ModuleList(Block(32, dropout) for _ in range(2))
            self.lm_head = nn.Linear(32, vocab_size, bias=False)
        self.wte.weight = self.lm_head.weight

    def forward(self, idx, targets=None):
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1], device=idx.device))
        for block in self.h:
            x = block(x)
        if targets is None:
            return self.lm_head(x[:, [-1]]), None
        logits = self.lm_head(x)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=self.ignore_index)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        for _ in range(max_new_tokens):
            logits = self(idx[:, -self.config.block_size :])[0][:, -1] / temperature
            if top_k is not None:
                logits[logits < logits.topk(top_k).values[:, [-1]]] = -math.inf
            idx = torch.cat((idx, logits.softmax(-1).multinomial(1)), dim=1)
        return idx


class MixedBag(nn.Module):
    """An untied head, a shared and a frozen layer, unused parameters, and buffers that change in each step."""

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embedding, self.head = nn.Embedding(50, 16), nn.Linear(16, 50)
            self.first, self.frozen, self.unused = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 3)
            self.scale = nn.Parameter(torch.randn(()))
        self.second = self.first
        self.frozen.requires_grad_(False)
        self.register_buffer("num_calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(16))
        self.register_buffer("scratch", torch.zeros(16), persistent=False)

    def forward(self, input_ids, targets):
        self.num_calls = self.num_calls + 1
        x = self.embedding(input_ids)
        x = x + F.dropout(self.second(self.frozen(self.first(x)).tanh()), 0.1, self.training) * self.scale
        self.mean.lerp_(x.detach().mean((0, 1)), 0.1)
        self.scratch += 1
        return {"loss": F.cross_entropy(self.head(x).flatten(0, 1), targets.flatten()), "logits": None}


MODULES = {"nanogpt": NanoGPT, "mixed": MixedBag}


def build_model(name, seed=0):
    """Return a tiny model by its name in CONFIGS or MODULES."""
    return MODULES[name](seed=seed) if name in MODULES else transformers_model(name, seed)
