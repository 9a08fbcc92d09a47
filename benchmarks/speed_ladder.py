"""Measure the optimizations between plain float32 training and homebrew, one at a time."""

import gc
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from homebrew import GPTConfig
from homebrew.distributed.precision import has_native_bf16
from homebrew.model.ops.chunked_loss import linear_cross_entropy
from homebrew.model.ops.mlp import mlp

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"


# Each optimization stays enabled for those after it. Its name is tested in the model and the loop below.
LADDER = [
    ("float32", "Baseline: four bytes per value, matrix products without tensor cores."),
    ("TF32", "Tensor cores multiply float32 values rounded to 10 bits of mantissa."),
    ("bfloat16", "Autocast: matrix products read half the bytes and use faster units."),
    ("compile", "Fuses sequences of elementwise operations into single kernels."),
    ("flash attention", "Does not write the T × T attention scores to memory."),
    ("padded vocabulary", "50,304 rows are a multiple of the tile size, 50,257 are not."),
    ("fused AdamW", "One kernel updates all weights, instead of several per tensor."),
    ("bfloat16 residual", "Halves the bytes of every layer norm and residual addition."),
    ("fused head and loss", "Computes logits in chunks and overwrites them with their gradient."),
    ("micro-batch 64", "Larger matrix products; kernels run longer than Python takes to launch them."),
    ("fused MLP", "Computes GELU's backward and the bias gradient in one pass."),
    ("cuDNN attention", "NVIDIA's own attention kernels are the fastest on recent GPUs."),
]
NEEDS_A_GPU = {"TF32", "fused MLP", "cuDNN attention", "micro-batch 64"}
NEEDS_BFLOAT16 = {"bfloat16", "bfloat16 residual"}
Enabled = frozenset[str]
Result = tuple[str, float, float, str]  # name, tokens/s, seconds per step, explanation


class Attention(nn.Module):
    """Causal self-attention, with explicit scores or in one kernel."""

    def __init__(self, config: GPTConfig, enabled: Enabled) -> None:
        super().__init__()
        self.enabled, self.n_head = enabled, config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.n_head, -1).transpose(1, 2) for part in self.c_attn(x).split(C, dim=2))
        if "flash attention" in self.enabled:
            kernel = SDPBackend.CUDNN_ATTENTION if "cuDNN attention" in self.enabled else SDPBackend.FLASH_ATTENTION
            fallbacks = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
            with sdpa_kernel([kernel, *fallbacks], set_priority=True):
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5  # (B, nh, T, T)
            future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
            y = scores.masked_fill(future, float("-inf")).softmax(-1).to(v.dtype) @ v
        out: Tensor = self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return out


class Block(nn.Module):
    """Transformer block: attention and MLP with residual connections."""

    def __init__(self, config: GPTConfig, enabled: Enabled) -> None:
        super().__init__()
        self.enabled = enabled
        self.ln_1, self.attn = nn.LayerNorm(config.n_embd), Attention(config, enabled)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = x + self.attn(self.ln_1(x))
        if "fused MLP" in self.enabled:
            return x + mlp(self.ln_2(x), self.c_fc.weight, self.c_fc.bias, self.c_proj.weight, self.c_proj.bias)
        hidden = F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh")
        out: Tensor = x + self.c_proj(hidden)
        return out


class LadderGPT(nn.Module):
    """GPT-2 with optimizations that can be enabled separately."""

    def __init__(self, config: GPTConfig, enabled: Enabled) -> None:
        super().__init__()
        self.enabled, self.vocab_size = enabled, config.vocab_size
        rows = config.padded_vocab_size if "padded vocabulary" in enabled else config.vocab_size
        self.wte = nn.Embedding(rows, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.Sequential(*(Block(config, enabled) for _ in range(config.n_layer)))
        self.ln_f = nn.LayerNorm(config.n_embd)
        nn.init.normal_(self.wte.weight, std=0.02)

    def forward(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of targets (B, T) given input_ids (B, T)."""
        x = self.wte(input_ids) + self.wpe.weight[: input_ids.shape[1]]
        if "bfloat16 residual" in self.enabled:
            x = x.to(torch.bfloat16)
        x = self.ln_f(self.blocks(x))
        if "fused head and loss" in self.enabled:
            return linear_cross_entropy(x, self.wte.weight, targets, self.vocab_size)
        return F.cross_entropy(F.linear(x, self.wte.weight).flatten(0, 1), targets.flatten())


@dataclass
class Options:
    """Measure each optimization: GPT-2 small on a GPU, a small model on a CPU."""

    model: str = "gpt2" if ON_GPU else "baby"
    """Model preset."""
    block_size: int = 1024 if ON_GPU else 128
    """Tokens per sequence."""
    steps: int = 20 if ON_GPU else 5
    """Timed steps per optimization. The median is reported."""
    plot: Path | None = None
    """PNG file for a bar chart. Needs `pip install -e '.[plot]'`."""


def main(options: Options) -> None:
    config = GPTConfig.preset(options.model, block_size=options.block_size)
    results: list[Result] = []
    enabled = Enabled()
    unsupported = (set() if ON_GPU else NEEDS_A_GPU) | (set() if has_native_bf16() else NEEDS_BFLOAT16)
    for name, explanation in LADDER:
        if name in unsupported:
            print(f"{name}: not supported on this machine", flush=True)
        else:
            enabled |= {name}
            batch = 64 if "micro-batch 64" in enabled else 8
            try:
                seconds = time_step(config, enabled, batch, options.steps)
            except torch.OutOfMemoryError:
                print(f"{name}: does not fit on this GPU", flush=True)
                enabled -= {name}
                continue
            results.append((name, batch * config.block_size / seconds, seconds, explanation))
            print(f"{name}: {results[-1][1]:,.0f} tokens/s", flush=True)
    print_table(results, options)
    if options.plot is not None:
        plot(results, options.plot)


def time_step(config: GPTConfig, enabled: Enabled, batch: int, steps: int) -> float:
    """Return the median seconds of a training step: forward, backward, clipping and AdamW."""
    gc.collect()  # frees the previous model
    if ON_GPU:
        torch.cuda.empty_cache()
    torch._dynamo.reset()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high" if "TF32" in enabled else "highest")
    model = LadderGPT(config, enabled).to(DEVICE)
    loss_of = torch.compile(model) if "compile" in enabled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused="fused AdamW" in enabled or None)
    tokens = torch.randint(config.vocab_size, (batch, config.block_size + 1), device=DEVICE)
    input_ids, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    times = []
    for _ in range(steps + 3):  # the first three warm up and compile
        start = perf_counter()
        with torch.autocast(DEVICE, torch.bfloat16, enabled="bfloat16" in enabled):
            loss = loss_of(input_ids, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()  # waits for the device
        times.append(perf_counter() - start)
    return median(times[3:])


def print_table(results: list[Result], options: Options) -> None:
    """Print the results as a table."""
    machine = torch.cuda.get_device_name() if ON_GPU else f"a CPU, {torch.get_num_threads()} threads"
    table = Table(title=f"{options.model}, sequences of {options.block_size}, on {machine}, torch {torch.__version__}")
    for column in ("optimization", "tokens/s", "ms/step", "gain", "total"):
        table.add_column(column, justify="left" if column == "optimization" else "right", no_wrap=True)
    table.add_column("explanation")
    previous = results[0][1]
    for name, throughput, seconds, explanation in results:
        gains = f"{throughput / previous:.2f} ×", f"{throughput / results[0][1]:.2f} ×"
        table.add_row(name, f"{throughput:,.0f}", f"{1000 * seconds:.1f}", *gains, explanation)
        previous = throughput
    Console(width=150).print(table)


def plot(results: list[Result], path: Path) -> None:
    """Draw the results as a bar chart."""
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(8, 0.4 * len(results) + 1))).subplots()
    bars = axes.barh([result[0] for result in results], [result[1] for result in results])
    axes.bar_label(bars, [f"{result[1]:,.0f}" for result in results], padding=3)
    axes.invert_yaxis()
    axes.set_xlabel("tokens/s")
    axes.margins(x=0.15)
    figure.savefig(path, bbox_inches="tight", dpi=150)


if __name__ == "__main__":
    main(tyro.cli(Options))
