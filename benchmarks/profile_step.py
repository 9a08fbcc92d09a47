"""Time per kernel of a training step, for plain compiled GPT-2 and for homebrew."""

import re
from dataclasses import dataclass
from pathlib import Path

from ablation import KERNELS, trainer_without
from command_line import run_script
from harness import ON_GPU, Report, RunSteps, StepTimer, synchronize
from implementations import random_ids
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from homebrew import GPTConfig

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

    model: str = "gpt2" if ON_GPU else "baby"
    """Model preset."""
    block_size: int = 1024 if ON_GPU else 64
    """Tokens per sequence."""
    micro_batch: int = 64 if ON_GPU else 8
    """Sequences per micro-batch."""
    accumulation: int = 8 if ON_GPU else 1
    """Micro-batches per step."""
    steps: int = 2
    """Profiled steps."""
    json: Path | None = None
    """JSON file for tables and raw times."""


def main(options: Options) -> None:
    report = Report(options.json)
    config = GPTConfig.preset(options.model, block_size=options.block_size)
    tokens = options.micro_batch * options.accumulation * config.block_size
    ids = random_ids(4 * tokens + 1, config.vocab_size)
    settings = {"micro_batch_size": options.micro_batch, "global_batch_tokens": tokens}
    report.metadata["step"] = f"{options.model}, {options.micro_batch} × {config.block_size} × {options.accumulation}"
    for name, without in (("before: GPT-2 in plain PyTorch, compiled", KERNELS), ("after: homebrew's Trainer", ())):
        kernels = kernel_times(trainer_without(without, config, ids, **settings), options.steps)
        categories: dict[str, tuple[float, int]] = {}
        for kernel, times in kernels.items():
            so_far = categories.get(category_of(kernel), (0.0, 0))
            categories[category_of(kernel)] = so_far[0] + times[0], so_far[1] + times[1]
        total = sum(seconds for seconds, _ in kernels.values())
        title = f"{name}: {1000 * total / options.steps:.1f} ms/step in kernels"
        report.add(title, table("category", categories, total, options.steps))
        report.add(f"{name}: kernels", table("kernel", kernels, total, options.steps)[:15])
        report.raw.append({"name": name, "categories": categories, "kernels": kernels})
    report.finish()


def table(what: str, times: dict[str, tuple[float, int]], total: float, steps: int) -> list[dict[str, str]]:
    """Return a table row for each kernel or category, the longest first."""
    return [
        {
            what: name if len(name) < 90 else name[:87] + "...",
            "calls/step": f"{calls / steps:.0f}",
            "ms/step": f"{1000 * seconds / steps:.2f}",
            "share": f"{seconds / total:.1%}",
        }
        for name, (seconds, calls) in sorted(times.items(), key=lambda pair: -pair[1][0])
    ]


def kernel_times(run_steps: RunSteps, steps: int) -> dict[str, tuple[float, int]]:
    """Return seconds and calls of each kernel (on a CPU: of each operator) in the steps after the first."""
    run_steps(StepTimer(1, 1))  # compiles
    timer = ProfiledTimer(steps)
    run_steps(timer)
    events = timer.profile.key_averages()
    if ON_GPU:
        kernels = [event for event in events if event.device_type == DeviceType.CUDA]
        return {event.key: (event.self_device_time_total / 1e6, event.count) for event in kernels}
    return {event.key: (event.self_cpu_time_total / 1e6, event.count) for event in events}


class ProfiledTimer(StepTimer):
    """Profile the steps that the timer measures."""

    def __init__(self, steps: int) -> None:
        super().__init__(1, steps)
        self.profile = profile(activities=[ProfilerActivity.CUDA if ON_GPU else ProfilerActivity.CPU])

    def tick(self) -> bool:
        """Count a step, and start or stop the profiler."""
        if self.num_steps + 1 == self.warmup:
            synchronize()
            self.profile.start()  # before the clock, because this takes long
        last = super().tick()
        if last:
            self.profile.stop()
        return last


def category_of(kernel: str) -> str:
    """Return the category of a kernel."""
    matches = (name for name, pattern in CATEGORIES.items() if re.search(pattern, kernel, re.IGNORECASE))
    return next(matches, "other, fused")


if __name__ == "__main__":
    run_script(main, Options)
