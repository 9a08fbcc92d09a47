"""Peak memory of training GPT-2, and the largest micro-batch that a card of 24 GiB holds.

Each measurement is a process of its own, so that nothing of one is left for the next.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from alternating import DEVICE, GIB, Clock, Report, Stretch
from sides import bare_loop, hf_model, hf_trainer, homebrew_trainer, nanogpt_loop, random_ids

from homebrew import GPT, GPTConfig
from homebrew.errors import TrainingError

SideName = Literal["homebrew", "homebrew, checkpointing", "bare loop", "nanoGPT", "Hugging Face Trainer"]


@dataclass
class Options:
    """Peak memory at one micro-batch, and the largest micro-batch under a cap; on a GPU."""

    model: str = "gpt2"
    """A preset."""
    block_size: int = 1024
    """Tokens in a sequence."""
    micro_batch: int = 64
    """At which peaks are compared."""
    cap_gib: float = 24.0
    """The card whose largest micro-batch is looked for; what the driver takes is not counted."""
    sides: tuple[SideName, ...] = ("homebrew", "nanoGPT", "Hugging Face Trainer", "homebrew, checkpointing")
    """Which to measure."""
    most: int = 256
    """Largest micro-batch tried."""
    nanogpt: Path | None = None
    """A folder with a copy of nanoGPT; our rewrite of its loop if not given."""
    json: Path | None = None
    """A file to write the figures to."""
    probe: tuple[SideName, int, float] | None = None
    """Measure this side at this micro-batch under this cap (0: none), in this process, and print it as JSON."""


def main(options: Options) -> None:
    if options.probe is not None:
        print(json.dumps(probe(options, *options.probe)))
        return
    report = Report(options.json)
    rows = []
    for side in options.sides:
        peak = ask(options, side, options.micro_batch, 0.0)
        row = {"side": side, f"peak GiB at micro-batch {options.micro_batch}": "none fits" if peak is None else peak}
        if DEVICE.type == "cuda":
            row[f"largest micro-batch in {options.cap_gib:g} GiB"] = str(
                largest(options, side, {} if peak is None else {options.micro_batch: float(peak)})
            )
        rows.append(row)
    shape = GPTConfig.preset(options.model, block_size=options.block_size)
    report.add(f"{options.model}, sequences of {shape.block_size}, one micro-batch a step", rows)
    report.finish()


def probe(options: Options, side: SideName, micro_batch: int, cap_gib: float) -> dict[str, str | None]:
    """The peak of three steps; None where they do not fit."""
    if cap_gib and DEVICE.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(cap_gib * GIB / torch.cuda.get_device_properties(0).total_memory)
    try:
        build(options, side, micro_batch)(Clock(1, 2))
    except torch.OutOfMemoryError:
        return {"peak": None}
    except TrainingError as error:  # the Trainer's own word for it
        if not isinstance(error.__cause__, torch.OutOfMemoryError):
            raise
        return {"peak": None}
    peak = torch.cuda.max_memory_allocated() / GIB if DEVICE.type == "cuda" else None
    return {"peak": "not measured" if peak is None else f"{peak:.2f}"}


def build(options: Options, side: SideName, micro_batch: int) -> Stretch:
    """A side's training at a micro-batch."""
    shape = GPTConfig.preset(options.model, block_size=options.block_size)
    ids = random_ids(4 * micro_batch * shape.block_size + 1, shape.vocab_size)
    on_gpu = DEVICE.type == "cuda"
    if side == "bare loop":
        return bare_loop(GPT(shape), ids, micro_batch=micro_batch, compile_model=on_gpu, autocast=on_gpu)
    if side == "nanoGPT":
        return nanogpt_loop(options.nanogpt, shape, ids, micro_batch=micro_batch)
    if side == "Hugging Face Trainer":
        return hf_trainer(hf_model(shape), ids, shape.block_size, micro_batch=micro_batch)
    checkpointing = side == "homebrew, checkpointing"
    return homebrew_trainer(GPT(shape), ids, micro_batch_size=micro_batch, activation_checkpointing=checkpointing)


def ask(options: Options, side: SideName, micro_batch: int, cap_gib: float) -> str | None:
    """`probe` in a process of its own."""
    words = ["--model", options.model, "--block-size", str(options.block_size)]
    words += [] if options.nanogpt is None else ["--nanogpt", str(options.nanogpt)]
    words += ["--probe", side, str(micro_batch), str(cap_gib)]
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side} at micro-batch {micro_batch} failed:\n{done.stderr[-3000:]}")
    found: str | None = json.loads(done.stdout.splitlines()[-1])["peak"]
    return found


def largest(options: Options, side: SideName, peaks: dict[int, float]) -> int:
    """The largest micro-batch under the cap, to a sixteenth.

    Memory grows in a straight line with the micro-batch: two points of it say where to look.

    Args:
        options: with the cap.
        side: whose.
        peaks: GiB without a cap, by micro-batch, where known.
    """
    fits, too_large = 0, options.most + 1
    size = min(8, options.most)
    while too_large - fits > max(1, fits // 16):
        peak = ask(options, side, size, options.cap_gib)
        if peak is None:
            too_large = size
        else:
            fits = size
            peaks = peaks | {size: float(peak)}
        size = (fits + too_large) // 2
        if len(peaks) > 1:
            (low, least), (high, most) = min(peaks.items()), max(peaks.items())
            guess = int(low + (options.cap_gib - least) * (high - low) / (most - least))
            # Where the guess has been tried already, a sixteenth beside it.
            size = min(max(guess, fits + max(1, fits // 16)), too_large - too_large // 17)
            size = min(size, too_large - 1)
    return fits


if __name__ == "__main__":
    main(tyro.cli(Options))
