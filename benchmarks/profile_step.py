"""Where a training step's time goes: plain compiled GPT-2 before, homebrew's Trainer after, as Markdown tables."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from alternating import DEVICE, Clock, Report, Stretch, machine
from plain_gpt import PlainGPT
from sides import adamw, compiled, device_batches, homebrew_trainer, plain_loop, random_ids
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from homebrew import GPT, GPTConfig

# The first pattern that a kernel's name matches says what it does.
KINDS = {
    "attention": r"sdpa|flash|fmha|attention|cudnn",
    "matrix products": r"gemm|nvjet|cutlass|cublas|::mm|addmm|bmm|xmma",
    "optimizer and clipping": r"adam|multi_tensor|lpnorm|foreach|linalg_vector_norm",
    "softmax and loss": r"softmax|nll|cross_entropy|score|_log_softmax|::exp|gather",
    "GELU": r"gelu|tanh",
    "layer norms": r"layer_norm|native_layer",
    "embeddings": r"embedding|index",
    "copies": r"copy|memcpy|memset|fill|clone|cat",
}


@dataclass
class Options:
    """Profile some steps of one micro-batch each."""

    model: str = "gpt2" if DEVICE.type == "cuda" else "baby"
    """A preset."""
    block_size: int = 1024 if DEVICE.type == "cuda" else 64
    """Tokens in a sequence."""
    micro_batch: int = 64 if DEVICE.type == "cuda" else 8
    """Sequences at once."""
    accumulation: int = 8 if DEVICE.type == "cuda" else 1
    """Micro-batches in a step."""
    steps: int = 2
    """Profiled."""
    top: int = 15
    """Kernels listed."""
    json: Path | None = None
    """A file to write the figures to."""


def main(options: Options) -> None:
    report = Report(options.json)
    shape = GPTConfig.preset(options.model, block_size=options.block_size)
    ids = random_ids(4 * options.micro_batch * options.accumulation * shape.block_size + 1, shape.vocab_size)
    tokens = options.micro_batch * options.accumulation * shape.block_size
    settings = {"micro_batch_size": options.micro_batch, "global_batch_tokens": tokens}
    print(f"{machine()}; {options.model}, {options.micro_batch} × {shape.block_size} × {options.accumulation}\n")
    for name, stretch in (
        ("before: plain GPT-2, autocast, compiled", before(shape, ids, options)),
        ("after: homebrew's Trainer", homebrew_trainer(GPT(shape), ids, **settings)),
    ):
        kernels = kernel_times(stretch, options.steps)
        total = sum(seconds for seconds, _ in kernels.values())
        print(f"### {name}: {1000 * total / options.steps:.1f} ms a step in kernels\n")
        kinds: dict[str, float] = {}
        for kernel, (seconds, _) in kernels.items():
            kinds[kind_of(kernel)] = kinds.get(kind_of(kernel), 0.0) + seconds
        print("| kind | ms a step | share |\n|---|---|---|")
        for kind, seconds in sorted(kinds.items(), key=lambda pair: -pair[1]):
            print(f"| {kind} | {1000 * seconds / options.steps:.2f} | {seconds / total:.1%} |")
        print("\n| kernel | calls a step | ms a step | share |\n|---|---|---|---|")
        for kernel, (seconds, calls) in sorted(kernels.items(), key=lambda pair: -pair[1][0])[: options.top]:
            short = kernel if len(kernel) < 90 else kernel[:87] + "..."
            row = f"{calls / options.steps:.0f} | {1000 * seconds / options.steps:.2f} | {seconds / total:.1%}"
            print(f"| `{short.replace('|', '¦')}` | {row} |")
        print()
        report.raw.append({"name": name, "kinds": kinds, "kernels": kernels})
    if options.json is not None:
        report.finish()


def before(shape: GPTConfig, ids: torch.Tensor, options: Options) -> Stretch:
    """The plain model in a plain loop."""
    model = PlainGPT(shape).to(DEVICE)
    return plain_loop(
        compiled(model, DEVICE.type == "cuda"),
        model,
        adamw(model, fused=True),
        device_batches(ids, shape.block_size, options.micro_batch),
        accumulation=options.accumulation,
    )


def kernel_times(stretch: Stretch, steps: int) -> dict[str, tuple[float, int]]:
    """Seconds and calls of each kernel (of each operator on a CPU) in the steps after the first."""
    stretch(Clock(1, 1))  # compiles
    on_gpu = DEVICE.type == "cuda"
    clock = _ProfiledClock(steps)
    stretch(clock)
    found = {}
    for event in clock.profile.key_averages():
        if on_gpu and event.device_type == DeviceType.CUDA:
            found[event.key] = (event.self_device_time_total / 1e6, event.count)
        elif not on_gpu and event.self_cpu_time_total:
            found[event.key] = (event.self_cpu_time_total / 1e6, event.count)
    return found


class _ProfiledClock(Clock):
    """Profiles the steps that a clock would time."""

    def __init__(self, steps: int) -> None:
        super().__init__(1, steps)
        activity = ProfilerActivity.CUDA if DEVICE.type == "cuda" else ProfilerActivity.CPU
        self.profile = profile(activities=[activity])
        self._ticks = 0

    def tick(self) -> bool:
        self._ticks += 1
        last = super().tick()
        if self._ticks == self.warmup:
            self.profile.start()
        if last:
            self.profile.stop()
        return last


def kind_of(kernel: str) -> str:
    """What a kernel does, by its name."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, kernel, re.IGNORECASE)), "other, fused")


if __name__ == "__main__":
    main(tyro.cli(Options))
