"""Peak memory of training GPT-2, and the largest micro-batch that fits into 24 GiB.

Each measurement runs in a new process, so that measurements do not affect each other.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from harness import DEVICE, GIB, Report, RunSteps, StepTimer
from implementations import bare_loop, hf_model, hf_trainer, homebrew_trainer, nanogpt_loop, random_ids

from homebrew import GPT, GPTConfig
from homebrew.errors import TrainingError

ImplementationName = Literal["homebrew", "homebrew, checkpointing", "bare loop", "nanoGPT", "Hugging Face Trainer"]


@dataclass
class Options:
    """Measure peak memory at one micro-batch size, and the largest micro-batch under a memory cap, on a GPU."""

    model: str = "gpt2"
    """Model preset."""
    block_size: int = 1024
    """Tokens per sequence."""
    micro_batch: int = 64
    """Micro-batch size at which peak memory is compared."""
    cap_gib: float = 24.0
    """Memory cap for the largest micro-batch. The driver's memory is not counted."""
    implementations: tuple[ImplementationName, ...] = (
        "homebrew",
        "nanoGPT",
        "Hugging Face Trainer",
        "homebrew, checkpointing",
    )
    """Implementations to measure."""
    max_micro_batch: int = 256
    """Largest micro-batch size to try."""
    nanogpt: Path | None = None
    """Folder with a clone of nanoGPT. Default: a rewrite of its model and loop."""
    json: Path | None = None
    """JSON file for tables and raw times."""
    probe: tuple[ImplementationName, int, float] | None = None
    """Internal: measure one implementation at a micro-batch size under a cap in GiB (0: none), and print JSON."""


def main(options: Options) -> None:
    if options.probe is not None:
        print(json.dumps(probe(options, *options.probe)))
        return
    report = Report(options.json)
    rows = []
    for implementation in options.implementations:
        peak = probe_in_subprocess(options, implementation, options.micro_batch, 0.0)
        row = {
            "implementation": implementation,
            f"peak GiB at micro-batch {options.micro_batch}": "out of memory" if peak is None else peak,
        }
        if DEVICE.type == "cuda":
            row[f"largest micro-batch in {options.cap_gib:g} GiB"] = str(
                largest_micro_batch(options, implementation, {} if peak is None else {options.micro_batch: float(peak)})
            )
        rows.append(row)
    config = GPTConfig.preset(options.model, block_size=options.block_size)
    report.add(f"{options.model}, sequences of {config.block_size}, one micro-batch per step", rows)
    report.finish()


def probe(
    options: Options, implementation: ImplementationName, micro_batch: int, cap_gib: float
) -> dict[str, str | None]:
    """Return the peak memory of three steps in GiB, or None if out of memory."""
    if cap_gib and DEVICE.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(cap_gib * GIB / torch.cuda.get_device_properties(0).total_memory)
    try:
        build(options, implementation, micro_batch)(StepTimer(1, 2))
    except torch.OutOfMemoryError:
        return {"peak": None}
    except TrainingError as error:  # raised by the Trainer
        if not isinstance(error.__cause__, torch.OutOfMemoryError):
            raise
        return {"peak": None}
    peak = torch.cuda.max_memory_allocated() / GIB if DEVICE.type == "cuda" else None
    return {"peak": "not measured" if peak is None else f"{peak:.2f}"}


def build(options: Options, implementation: ImplementationName, micro_batch: int) -> RunSteps:
    """Build an implementation with a micro-batch size."""
    config = GPTConfig.preset(options.model, block_size=options.block_size)
    ids = random_ids(4 * micro_batch * config.block_size + 1, config.vocab_size)
    on_gpu = DEVICE.type == "cuda"
    if implementation == "bare loop":
        return bare_loop(GPT(config), ids, micro_batch=micro_batch, compile_model=on_gpu, autocast=on_gpu)
    if implementation == "nanoGPT":
        return nanogpt_loop(options.nanogpt, config, ids, micro_batch=micro_batch)
    if implementation == "Hugging Face Trainer":
        return hf_trainer(hf_model(config), ids, config.block_size, micro_batch=micro_batch)
    checkpointing = implementation == "homebrew, checkpointing"
    return homebrew_trainer(GPT(config), ids, micro_batch_size=micro_batch, activation_checkpointing=checkpointing)


def probe_in_subprocess(
    options: Options, implementation: ImplementationName, micro_batch: int, cap_gib: float
) -> str | None:
    """Run `probe` in a new process."""
    arguments = ["--model", options.model, "--block-size", str(options.block_size)]
    arguments += [] if options.nanogpt is None else ["--nanogpt", str(options.nanogpt)]
    arguments += ["--probe", implementation, str(micro_batch), str(cap_gib)]
    process = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=False)
    if process.returncode:
        raise SystemExit(f"{implementation} at micro-batch {micro_batch} failed:\n{process.stderr[-3000:]}")
    peak: str | None = json.loads(process.stdout.splitlines()[-1])["peak"]
    return peak


def largest_micro_batch(options: Options, implementation: ImplementationName, peaks: dict[int, float]) -> int:
    """Find the largest micro-batch size that fits under the cap, to within a sixteenth.

    Memory is a linear function of the micro-batch size, so two measurements predict where to search.

    Args:
        options: Contains the cap.
        implementation: What to measure.
        peaks: Known peak memory in GiB without a cap, by micro-batch size.
    """
    fits, too_large = 0, options.max_micro_batch + 1
    size = min(8, options.max_micro_batch)
    while too_large - fits > max(1, fits // 16):
        peak = probe_in_subprocess(options, implementation, size, options.cap_gib)
        if peak is None:
            too_large = size
        else:
            fits = size
            peaks = peaks | {size: float(peak)}
        size = (fits + too_large) // 2
        if len(peaks) > 1:
            (low, low_gib), (high, high_gib) = min(peaks.items()), max(peaks.items())
            guess = int(low + (options.cap_gib - low_gib) * (high - low) / (high_gib - low_gib))
            # If the guess was tried already, try a sixteenth more or less.
            size = min(max(guess, fits + max(1, fits // 16)), too_large - too_large // 17)
            size = min(size, too_large - 1)
    return fits


if __name__ == "__main__":
    main(tyro.cli(Options))
