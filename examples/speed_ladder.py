"""Climb from plain float32 to homebrew's speed, one change at a time, each timed on this machine."""

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
from homebrew.distributed.accelerator import has_native_bf16
from homebrew.model.ops.chunked_loss import linear_cross_entropy
from homebrew.model.ops.mlp import mlp

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"


# A rung's name is the switch it turns on in the model or the loop below, and leaves on for those after it.
LADDER = [
    ("float32", "Where everyone starts: four bytes a number, products outside the tensor cores."),
    ("TF32", "Tensor cores multiply float32 rounded to 10 bits of fraction."),
    ("bfloat16", "Autocast's products move half the bytes, through faster units."),
    ("compile", "Chains of elementwise operations become single kernels."),
    ("flash attention", "Never writes the T × T scores to memory."),
    ("padded vocabulary", "50,304 rows fill the product's tiles, 50,257 do not."),
    ("fused AdamW", "One kernel updates all weights, instead of several for each tensor."),
    ("bfloat16 residual", "Halves the bytes of every norm and sum between the blocks."),
    ("fused head and loss", "The gradient takes the logits' place, some tokens at a time."),
    ("micro-batch 64", "Larger products, in kernels that run for longer than Python takes to launch them."),
    ("fused MLP", "GELU's backward and the bias's gradient share one pass."),
    ("cuDNN attention", "The vendor's attention kernels suit its newest cards best."),
]
NEEDS_A_GPU = {"TF32", "fused MLP", "cuDNN attention", "micro-batch 64"}
NEEDS_BFLOAT16 = {"bfloat16", "bfloat16 residual"}
Switches = frozenset[str]
Rung = tuple[str, float, float, str]  # name, tokens/s, seconds a step, why


class Attention(nn.Module):
    """Causal self-attention: written out, or in one kernel."""

    def __init__(self, config: GPTConfig, on: Switches) -> None:
        super().__init__()
        self.on, self.n_head = on, config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.n_head, -1).transpose(1, 2) for part in self.c_attn(x).split(C, dim=2))
        if "flash attention" in self.on:
            kernel = SDPBackend.CUDNN_ATTENTION if "cuDNN attention" in self.on else SDPBackend.FLASH_ATTENTION
            others = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
            with sdpa_kernel([kernel, *others], set_priority=True):
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5  # (B, nh, T, T)
            later = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
            y = scores.masked_fill(later, float("-inf")).softmax(-1).to(v.dtype) @ v
        out: Tensor = self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return out


class Block(nn.Module):
    """Attention and MLP on a residual stream."""

    def __init__(self, config: GPTConfig, on: Switches) -> None:
        super().__init__()
        self.on = on
        self.ln_1, self.attn = nn.LayerNorm(config.n_embd), Attention(config, on)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = x + self.attn(self.ln_1(x))
        if "fused MLP" in self.on:
            return x + mlp(self.ln_2(x), self.c_fc.weight, self.c_fc.bias, self.c_proj.weight, self.c_proj.bias)
        inside = F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh")
        out: Tensor = x + self.c_proj(inside)
        return out


class LadderGPT(nn.Module):
    """GPT-2 with switches."""

    def __init__(self, config: GPTConfig, on: Switches) -> None:
        super().__init__()
        self.on, self.vocab_size = on, config.vocab_size
        rows = config.padded_vocab_size if "padded vocabulary" in on else config.vocab_size
        self.wte = nn.Embedding(rows, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.Sequential(*(Block(config, on) for _ in range(config.n_layer)))
        self.ln_f = nn.LayerNorm(config.n_embd)
        nn.init.normal_(self.wte.weight, std=0.02)

    def forward(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of targets (B, T) after input_ids (B, T)."""
        x = self.wte(input_ids) + self.wpe.weight[: input_ids.shape[1]]
        if "bfloat16 residual" in self.on:
            x = x.to(torch.bfloat16)
        x = self.ln_f(self.blocks(x))
        if "fused head and loss" in self.on:
            return linear_cross_entropy(x, self.wte.weight, targets, self.vocab_size)
        return F.cross_entropy(F.linear(x, self.wte.weight).flatten(0, 1), targets.flatten())


@dataclass
class Options:
    """Time each rung: GPT-2 small on a GPU, a small model on a CPU."""

    model: str = "gpt2" if ON_GPU else "baby"
    """A preset."""
    block_size: int = 1024 if ON_GPU else 128
    """Tokens in a sequence."""
    steps: int = 20 if ON_GPU else 5
    """Timed steps of a rung; the median counts."""
    plot: Path | None = None
    """A PNG to draw the ladder in; needs `pip install 'homebrew-gpt[plot]'`."""


def main(options: Options) -> None:
    config = GPTConfig.preset(options.model, block_size=options.block_size)
    rungs: list[Rung] = []
    on = Switches()
    absent = (set() if ON_GPU else NEEDS_A_GPU) | (set() if has_native_bf16() else NEEDS_BFLOAT16)
    for name, why in LADDER:
        if name in absent:
            print(f"{name}: not on this machine", flush=True)
        else:
            on |= {name}
            batch = 64 if "micro-batch 64" in on else 8
            try:
                seconds = time_step(config, on, batch, options.steps)
            except torch.OutOfMemoryError:
                print(f"{name}: does not fit on this GPU", flush=True)
                on -= {name}
                continue
            rungs.append((name, batch * config.block_size / seconds, seconds, why))
            print(f"{name}: {rungs[-1][1]:,.0f} tokens/s", flush=True)
    show(rungs, options)
    if options.plot is not None:
        draw(rungs, options.plot)


def time_step(config: GPTConfig, on: Switches, batch: int, steps: int) -> float:
    """Median seconds of a training step: forward, backward, clipping, AdamW."""
    gc.collect()  # the model of the rung before
    if ON_GPU:
        torch.cuda.empty_cache()
    torch._dynamo.reset()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high" if "TF32" in on else "highest")
    model = LadderGPT(config, on).to(DEVICE)
    loss_of = torch.compile(model) if "compile" in on else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused="fused AdamW" in on or None)
    tokens = torch.randint(config.vocab_size, (batch, config.block_size + 1), device=DEVICE)
    input_ids, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    times = []
    for _ in range(steps + 3):  # the first ones compile
        began = perf_counter()
        with torch.autocast(DEVICE, torch.bfloat16, enabled="bfloat16" in on):
            loss = loss_of(input_ids, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()  # waits for all that was queued
        times.append(perf_counter() - began)
    return median(times[3:])


def show(rungs: list[Rung], options: Options) -> None:
    """The table."""
    machine = torch.cuda.get_device_name() if ON_GPU else f"a CPU, {torch.get_num_threads()} threads"
    table = Table(title=f"{options.model}, sequences of {options.block_size}, on {machine}, torch {torch.__version__}")
    for column in ("rung", "tokens/s", "ms a step", "this rung", "in all"):
        table.add_column(column, justify="left" if column == "rung" else "right", no_wrap=True)
    table.add_column("why")
    before = rungs[0][1]
    for name, speed, seconds, why in rungs:
        gains = f"{speed / before:.2f} ×", f"{speed / rungs[0][1]:.2f} ×"
        table.add_row(name, f"{speed:,.0f}", f"{1000 * seconds:.1f}", *gains, why)
        before = speed
    Console(width=150).print(table)


def draw(rungs: list[Rung], path: Path) -> None:
    """The picture."""
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(8, 0.4 * len(rungs) + 1))).subplots()
    bars = axes.barh([rung[0] for rung in rungs], [rung[1] for rung in rungs])
    axes.bar_label(bars, [f"{rung[1]:,.0f}" for rung in rungs], padding=3)
    axes.invert_yaxis()
    axes.set_xlabel("tokens/s")
    axes.margins(x=0.15)
    figure.savefig(path, bbox_inches="tight", dpi=150)


if __name__ == "__main__":
    main(tyro.cli(Options))
