"""Loss curves of homebrew's fast path and a plain implementation, from the same weights, over several seeds.

The fast path is homebrew's default under autocast: bfloat16 residual stream, fused head and fused MLP. The plain path
is GPT-2 in plain PyTorch under autocast, with residual stream, layer norms and loss in float32. Both train on the same
batches. The seed determines weights and batches.
"""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev

import torch
import tyro
from harness import DEVICE, Report
from implementations import adamw, compiled
from plain_gpt import PlainGPT
from torch import nn

from homebrew import GPT, GPTConfig, TokenDataset, load_corpus, warmup_cosine


@dataclass
class Options:
    """Compare 200 steps of both paths on Tiny Shakespeare."""

    model: str = "gpt2" if DEVICE.type == "cuda" else "baby"
    """Model preset."""
    block_size: int = 1024 if DEVICE.type == "cuda" else 64
    """Tokens per sequence."""
    tokenizer: str = "gpt2"
    """Tokenizer: gpt2, bytes or char."""
    text: Path | None = None
    """Text file to train on. Default: Tiny Shakespeare."""
    batch: int = 16
    """Sequences per step."""
    steps: int = 200
    """Steps per run."""
    seeds: int = 4
    """Runs per path, at least 2."""
    learning_rate: float = 6e-4
    """Peak learning rate."""
    points: int = 8
    """Number of rows. A row is the mean over the steps since the previous row."""
    json: Path | None = None
    """JSON file for tables and raw times."""


def main(options: Options) -> None:
    report = Report(options.json)
    text = load_corpus("tinyshakespeare", path=options.text).text
    dataset = TokenDataset.from_text(text, options.block_size, tokenizer=options.tokenizer)
    config = GPTConfig.preset(options.model, block_size=options.block_size, vocab_size=dataset.vocab_size)
    curves: dict[str, list[list[float]]] = {"fast": [], "plain": []}
    for seed in range(options.seeds):
        for path, runs in curves.items():
            runs.append(train(path, config, dataset, seed, options))
    edges = [round(options.steps * i / options.points) for i in range(options.points + 1)]
    rows = []
    for first, last in pairwise(edges):
        fast, plain = ([mean(run[first:last]) for run in curves[path]] for path in ("fast", "plain"))
        differences = [a - b for a, b in zip(fast, plain, strict=True)]
        rows.append(
            {
                "steps": f"{first + 1}–{last}",
                "fast": f"{mean(fast):.4f}",
                "plain": f"{mean(plain):.4f}",
                "fast − plain": f"{mean(differences):+.4f}",
                "largest |fast − plain|": f"{max(map(abs, differences)):.4f}",
                "σ of the plain path's seeds": f"{stdev(plain):.4f}",
            }
        )
    report.add(f"{options.model}, {options.batch} × {options.block_size} tokens per step, {options.seeds} seeds", rows)
    report.raw.append({"seeds": options.seeds, **curves})
    report.finish()


def train(path: str, config: GPTConfig, dataset: TokenDataset, seed: int, options: Options) -> list[float]:
    """Train, and return the loss of each step."""
    torch._dynamo.reset()
    model: nn.Module = GPT(config, seed=seed)
    if path == "plain":
        weights = model.state_dict()
        model = PlainGPT(config, pad_vocab=True, score_padding=False)
        model.load_state_dict(weights)
    model.to(DEVICE)
    loss_function = compiled(model, DEVICE.type == "cuda")
    optimizer = adamw(model, fused=True)
    schedule = warmup_cosine(warmup_steps=options.steps // 10, max_steps=options.steps, min_lr_ratio=0.1)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * schedule(step)
        indices = torch.randint(len(dataset), (options.batch,), generator=generator)
        input_ids, targets = (ids.to(DEVICE) for ids in dataset.batch(indices))
        with torch.autocast(DEVICE.type, torch.bfloat16):
            loss = loss_function(input_ids, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    return torch.stack(losses).float().tolist()


if __name__ == "__main__":
    main(tyro.cli(Options))
