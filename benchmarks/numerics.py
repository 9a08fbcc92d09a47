"""Whether the fast path learns what the plain one does: loss curves of both, over seeds, from the same weights.

The fast path is homebrew's default: the residual stream in bfloat16 under autocast, the fused head and MLP. The
plain one is GPT-2 written in plain PyTorch under the same autocast, its residual stream, norms and loss in float32.
Both see the same batches; a seed gives other weights and other batches.
"""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev

import torch
import tyro
from alternating import DEVICE, Report
from plain_gpt import PlainGPT
from sides import adamw, compiled
from torch import nn

from homebrew import GPT, GPTConfig, TokenDataset, load_corpus
from homebrew.training.schedule import warmup_cosine


@dataclass
class Options:
    """Compare 200 steps of both paths on Tiny Shakespeare."""

    model: str = "gpt2" if DEVICE.type == "cuda" else "baby"
    """A preset."""
    block_size: int = 1024 if DEVICE.type == "cuda" else 64
    """Tokens in a sequence."""
    tokenizer: str = "gpt2"
    """gpt2, bytes or char."""
    text: Path | None = None
    """A text file instead of Tiny Shakespeare."""
    batch: int = 16
    """Sequences a step."""
    steps: int = 200
    """Of each run."""
    seeds: int = 4
    """Runs of each path, at least 2."""
    learning_rate: float = 6e-4
    """Peak."""
    points: int = 8
    """Rows of the table; a row is a mean over the steps since the row before."""
    json: Path | None = None
    """A file to write the figures to."""


def main(options: Options) -> None:
    report = Report(options.json)
    text = load_corpus("tinyshakespeare", path=options.text).text
    dataset = TokenDataset.from_text(text, options.block_size, tokenizer=options.tokenizer)
    shape = GPTConfig.preset(options.model, block_size=options.block_size, vocab_size=dataset.vocab_size)
    curves: dict[str, list[list[float]]] = {"fast": [], "plain": []}
    for seed in range(options.seeds):
        for path, runs in curves.items():
            runs.append(train(path, shape, dataset, seed, options))
    edges = [round(options.steps * i / options.points) for i in range(options.points + 1)]
    rows = []
    for first, last in pairwise(edges):
        fast, plain = ([mean(run[first:last]) for run in curves[path]] for path in ("fast", "plain"))
        apart = [a - b for a, b in zip(fast, plain, strict=True)]
        rows.append(
            {
                "steps": f"{first + 1}–{last}",
                "fast": f"{mean(fast):.4f}",
                "plain": f"{mean(plain):.4f}",
                "fast − plain": f"{mean(apart):+.4f}",
                "largest |fast − plain|": f"{max(map(abs, apart)):.4f}",
                "σ of the plain path's seeds": f"{stdev(plain):.4f}",
            }
        )
    report.add(f"{options.model}, {options.batch} × {options.block_size} tokens a step, {options.seeds} seeds", rows)
    report.raw.append({"seeds": options.seeds, **curves})
    report.finish()


def train(path: str, shape: GPTConfig, dataset: TokenDataset, seed: int, options: Options) -> list[float]:
    """A run's losses, step by step."""
    torch._dynamo.reset()
    model: nn.Module = GPT(shape, seed=seed)
    if path == "plain":
        weights = model.state_dict()
        model = PlainGPT(shape, pad_vocab=True, score_padding=False)
        model.load_state_dict(weights)
    model.to(DEVICE)
    loss_of = compiled(model, DEVICE.type == "cuda")
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
            loss = loss_of(input_ids, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    return torch.stack(losses).float().tolist()


if __name__ == "__main__":
    main(tyro.cli(Options))
