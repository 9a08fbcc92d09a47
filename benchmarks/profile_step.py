"""Time per kernel of a training step, for plain compiled GPT-2 and for homebrew, as Markdown tables."""

import re
from dataclasses import dataclass
from pathlib import Path

import tyro
from ablation import KERNELS, trainer_without
from harness import DEVICE, Report, RunSteps, StepTimer, describe_machine
from implementations import homebrew_trainer, random_ids
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from homebrew import GPT, GPTConfig

# A kernel belongs to the first category whose pattern matches its name.
CATEGORIES = {
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
    """Profile training steps."""

    model: str = "gpt2" if DEVICE.type == "cuda" else "baby"
    """Model preset."""
    block_size: int = 1024 if DEVICE.type == "cuda" else 64
    """Tokens per sequence."""
    micro_batch: int = 64 if DEVICE.type == "cuda" else 8
    """Sequences per micro-batch."""
    accumulation: int = 8 if DEVICE.type == "cuda" else 1
    """Micro-batches per step."""
    steps: int = 2
    """Profiled steps."""
    top: int = 15
    """Number of kernels to list."""
    json: Path | None = None
    """JSON file for tables and raw times."""


def main(options: Options) -> None:
    report = Report(options.json)
    config = GPTConfig.preset(options.model, block_size=options.block_size)
    ids = random_ids(4 * options.micro_batch * options.accumulation * config.block_size + 1, config.vocab_size)
    tokens = options.micro_batch * options.accumulation * config.block_size
    settings = {"micro_batch_size": options.micro_batch, "global_batch_tokens": tokens}
    print(
        f"{describe_machine()}; {options.model}, {options.micro_batch} × {config.block_size} × {options.accumulation}\n"
    )
    for name, run_steps in (
        ("before: GPT-2 in plain PyTorch", trainer_without(KERNELS, config, ids, **settings)),
        ("after: homebrew's Trainer", homebrew_trainer(GPT(config), ids, **settings)),
    ):
        kernels = kernel_times(run_steps, options.steps)
        total = sum(seconds for seconds, _ in kernels.values())
        print(f"### {name}: {1000 * total / options.steps:.1f} ms/step in kernels\n")
        categories: dict[str, float] = {}
        for kernel, (seconds, _) in kernels.items():
            categories[category_of(kernel)] = categories.get(category_of(kernel), 0.0) + seconds
        print("| category | ms/step | share |\n|---|---|---|")
        for category, seconds in sorted(categories.items(), key=lambda pair: -pair[1]):
            print(f"| {category} | {1000 * seconds / options.steps:.2f} | {seconds / total:.1%} |")
        print("\n| kernel | calls/step | ms/step | share |\n|---|---|---|---|")
        for kernel, (seconds, calls) in sorted(kernels.items(), key=lambda pair: -pair[1][0])[: options.top]:
            short = kernel if len(kernel) < 90 else kernel[:87] + "..."
            row = f"{calls / options.steps:.0f} | {1000 * seconds / options.steps:.2f} | {seconds / total:.1%}"
            print(f"| `{short.replace('|', '¦')}` | {row} |")
        print()
        report.raw.append({"name": name, "categories": categories, "kernels": kernels})
    if options.json is not None:
        report.finish()


def kernel_times(run_steps: RunSteps, steps: int) -> dict[str, tuple[float, int]]:
    """Return seconds and calls of each kernel (on a CPU: of each operator) in the steps after the first."""
    run_steps(StepTimer(1, 1))  # compiles
    on_gpu = DEVICE.type == "cuda"
    timer = ProfiledTimer(steps)
    run_steps(timer)
    times = {}
    for event in timer.profile.key_averages():
        if on_gpu and event.device_type == DeviceType.CUDA:
            times[event.key] = (event.self_device_time_total / 1e6, event.count)
        elif not on_gpu and event.self_cpu_time_total:
            times[event.key] = (event.self_cpu_time_total / 1e6, event.count)
    return times


class ProfiledTimer(StepTimer):
    """Profile the steps that the timer measures."""

    def __init__(self, steps: int) -> None:
        super().__init__(1, steps)
        activity = ProfilerActivity.CUDA if DEVICE.type == "cuda" else ProfilerActivity.CPU
        self.profile = profile(activities=[activity])
        self._ticks = 0

    def tick(self) -> bool:
        """Count a step, and start or stop the profiler."""
        self._ticks += 1
        last = super().tick()
        if self._ticks == self.warmup:
            self.profile.start()
        if last:
            self.profile.stop()
        return last


def category_of(kernel: str) -> str:
    """Return the category of a kernel."""
    return next(
        (category for category, pattern in CATEGORIES.items() if re.search(pattern, kernel, re.IGNORECASE)),
        "other, fused",
    )


if __name__ == "__main__":
    main(tyro.cli(Options))
