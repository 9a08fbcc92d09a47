"""Implementations to compare: homebrew's Trainer, a plain loop, nanoGPT, Hugging Face's Trainer and llm.c."""

import atexit
import contextlib
import importlib.util
import io
import math
import os
import re
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from command_line import parse_settings
from harness import DEVICE, ON_GPU, Implementation, RunSteps, StepTimer
from torch import Tensor, nn

from homebrew import GPT, Callback, GPTConfig, TokenDataset, Trainer, TrainerConfig
from homebrew.distributed.precision import has_native_bf16
from homebrew.errors import ConfigError
from homebrew.training.global_settings import separate_compile_cache
from homebrew.training.optimizer import decay_groups

Batches = Iterator[tuple[Tensor, Tensor]]
SETTINGS: dict[str, Any] = {"lr": 6e-4, "betas": (0.9, 0.95)}
"""AdamW settings of all implementations."""


def model_config(text: str, **changes: Any) -> GPTConfig:
    """Return the configuration of a model: a preset with changes, such as "gpt2:n_layer=6,n_head=6,n_embd=384"."""
    preset, _, text = text.partition(":")
    try:
        return GPTConfig.preset(preset, **(parse_settings(text) | changes))
    except TypeError as error:
        raise ConfigError(f"{text!r} has a setting that GPTConfig does not have: {error}.") from error


def random_ids(count: int, vocab_size: int, seed: int = 0) -> Tensor:
    """Return random token ids, (count,), int64."""
    return torch.randint(vocab_size, (count,), generator=torch.Generator().manual_seed(seed))


def device_batches(ids: Tensor, block_size: int, micro_batch: int) -> Batches:
    """Cycle through a few batches that are already on the device, so that loading data takes no time."""
    rows = ids[: len(ids) // (block_size + 1) * (block_size + 1)].view(-1, block_size + 1)
    chunks = rows[: len(rows) // micro_batch * micro_batch].to(DEVICE).split(micro_batch)
    return cycle([(chunk[:, :-1].contiguous(), chunk[:, 1:].contiguous()) for chunk in chunks])


def temporary_folder() -> Path:
    """Create a folder that is removed when the process exits."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Hide output and warnings."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
        yield


class IsolatedAccelerate:
    """Context manager that gives each Trainer its own copy of Accelerate's process-wide state.

    Enter it to build the Trainer, and again to train.
    """

    _classes = (PartialState, AcceleratorState, GradientState)

    def __init__(self) -> None:
        self._states: list[dict[str, Any]] = [{} for _ in self._classes]

    def __enter__(self) -> None:
        for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
            del os.environ[name]  # set by the previous Trainer
        self._swap()

    def __exit__(self, *_: object) -> None:
        self._swap()

    def _swap(self) -> None:
        for index, state_class in enumerate(self._classes):
            previous = dict(state_class._shared_state)
            state_class._shared_state.clear()
            state_class._shared_state.update(self._states[index])
            self._states[index] = previous


# --- homebrew


class StopTraining(BaseException):
    """Stops training without saving a checkpoint. The Trainer would save one for an `Exception` in an evaluation."""


class _TimerCallback(Callback):
    """Stops training when the timer has measured all steps."""

    timer: StepTimer

    def on_step_end(self, trainer: Trainer) -> None:
        if self.timer.tick():
            raise StopTraining


def homebrew_trainer(model: GPT, ids: Tensor, **settings: Any) -> RunSteps:
    """Build homebrew's Trainer with its default settings."""
    accelerate_state, callback = IsolatedAccelerate(), _TimerCallback()
    dataset = TokenDataset.from_tokens(ids, model.config.block_size, vocab_size=model.config.vocab_size)
    # No warm-up, as in the other implementations: a GPU's power draw, and therefore its clock, depends on the values it
    # multiplies.
    defaults = {"max_steps": 1_000_000, "warmup_steps": 0, "save_every": None}
    config = TrainerConfig(output_dir=temporary_folder(), **(defaults | settings))
    with accelerate_state:
        trainer = Trainer(model, dataset, config=config, callbacks=[callback])

    def run_steps(timer: StepTimer) -> None:
        callback.timer = timer
        with accelerate_state, silent(), contextlib.suppress(StopTraining):
            trainer.train()

    return run_steps


# --- a plain loop


def plain_loop(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    *,
    accumulation: int = 1,
    compile_model: bool = ON_GPU,
    mode: str | None = None,
    autocast: bool = ON_GPU,
    read_loss_every: int = 0,
) -> RunSteps:
    """Build a plain training loop with gradient accumulation and clipping to norm 1.

    Args:
        model: Model on its device. It returns its mean loss, or (logits, loss).
        optimizer: Optimizer of the model.
        batches: (input_ids, targets) on the device.
        accumulation: Micro-batches per step.
        compile_model: Whether to use torch.compile, in `mode`.
        mode: Mode of torch.compile.
        autocast: Whether to use bfloat16 autocast.
        read_loss_every: Steps between reading the loss, which waits for the device. 0: never.
    """
    separate_compile_cache()
    # Static shapes: otherwise the shapes of several implementations in one process would make them dynamic.
    forward = torch.compile(model, mode=mode, dynamic=False) if compile_model else model
    count = 0

    def run_steps(timer: StepTimer) -> None:
        nonlocal count
        while True:
            for _ in range(accumulation):
                with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
                    output = forward(*next(batches))
                loss = output[1] if isinstance(output, tuple) else output
                (loss / accumulation).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            count += 1
            if read_loss_every and count % read_loss_every == 0:
                loss.item()
            if timer.tick():
                return

    return run_steps


def adamw(model: nn.Module, *, fused: bool = True) -> torch.optim.AdamW:
    """Return AdamW with weight decay on matrices only."""
    return torch.optim.AdamW(decay_groups(model.parameters(), 0.1), **SETTINGS, fused=fused)


def bare_loop(config: GPTConfig, ids: Tensor, *, micro_batch: int, accumulation: int) -> Implementation:
    """Return a plain loop around homebrew's model."""

    def build() -> RunSteps:
        model = GPT(config).to(DEVICE)
        mode = "reduce-overhead" if ON_GPU and accumulation == 1 else None
        batches = device_batches(ids, config.block_size, micro_batch)
        settings = {"accumulation": accumulation, "mode": mode, "autocast": has_native_bf16()}
        return plain_loop(model, adamw(model), batches, **settings)

    settings = "the same model, on batches that are on the device; it never reads the loss"
    return Implementation("bare loop", build, settings)


# --- nanoGPT


def nanogpt(
    folder: Path | None, config: GPTConfig, ids: Tensor, *, micro_batch: int, accumulation: int, bias: bool
) -> Implementation:
    """Return nanoGPT's training loop with its data loading: compiled bfloat16 on a GPU, float32 on a CPU."""

    def build() -> RunSteps:
        if ON_GPU:
            torch.set_float32_matmul_precision("high")
        if folder is None or not (folder / "model.py").exists():
            raise SystemExit("Pass a folder with a clone of nanoGPT: --nanogpt FOLDER.")
        spec: Any = importlib.util.spec_from_file_location("nanogpt_model", folder / "model.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        names = ("n_layer", "n_head", "n_embd", "block_size", "dropout")
        fields = {name: getattr(config, name) for name in names}
        vocab_size = 50_304 if config.vocab_size == 50_257 else config.vocab_size
        with silent():
            model = module.GPT(module.GPTConfig(vocab_size=vocab_size, bias=bias, **fields)).to(DEVICE)
            optimizer = model.configure_optimizers(0.1, SETTINGS["lr"], SETTINGS["betas"], DEVICE.type)
        batches = nanogpt_batches(ids, config.block_size, micro_batch)
        return plain_loop(model, optimizer, batches, accumulation=accumulation, read_loss_every=10)

    speed = "torch.compile, bfloat16 autocast, TF32, fused AdamW" if ON_GPU else "float32, not compiled"
    biases = "" if bias else "; no biases, its default, which is not GPT-2"
    settings = f"as its README recommends: {speed}; GPT-2's vocabulary padded to 50,304{biases}"
    return Implementation(f"nanoGPT, {bias=}", build, settings)


def nanogpt_batches(ids: Tensor, block_size: int, micro_batch: int) -> Batches:
    """Yield batches as nanoGPT's `get_batch` does: random windows of a memory-mapped file."""
    path = temporary_folder() / "train.bin"
    ids.numpy().astype(np.uint16).tofile(path)
    while True:
        data = np.memmap(path, dtype=np.uint16, mode="r")
        starts = torch.randint(len(data) - block_size, (micro_batch,)).tolist()
        x = torch.stack([torch.from_numpy(data[i : i + block_size].astype(np.int64)) for i in starts])
        y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + block_size].astype(np.int64)) for i in starts])
        if ON_GPU:
            x, y = x.pin_memory().to(DEVICE, non_blocking=True), y.pin_memory().to(DEVICE, non_blocking=True)
        yield x, y


# --- Hugging Face


HF_SETTINGS: dict[str, Any] = {
    # What Transformers' pages on training on one GPU and on torch.compile recommend for speed.
    "optim": "adamw_torch_fused",
    "bf16": ON_GPU,
    "tf32": True if ON_GPU else None,
    "torch_compile": ON_GPU,
    "dataloader_num_workers": 4,
    "dataloader_pin_memory": True,
    "dataloader_persistent_workers": True,
    "dataloader_prefetch_factor": 4,
    "accelerator_config": {"non_blocking": True},
    "logging_nan_inf_filter": False,  # the filter waits for the device after every micro-batch
}


def hf_model(config: GPTConfig, *, pad_vocab: bool = True) -> Any:
    """Return Transformers' GPT-2 with random weights.

    With `pad_vocab`, the vocabulary is padded to a multiple of 64, which makes matrix products faster. The same call
    also pads a pretrained model.
    """
    from transformers import AutoModelForCausalLM, GPT2Config

    sizes = {name: getattr(config, name) for name in ("vocab_size", "n_embd", "n_layer", "n_head")}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout)
    tokens = {"n_positions": config.block_size, "bos_token_id": 0, "eos_token_id": 0}
    hf_config = GPT2Config(**sizes, **dropout, **tokens, use_cache=False)
    model = AutoModelForCausalLM.from_config(hf_config, attn_implementation="sdpa")
    if pad_vocab:
        model.resize_token_embeddings(pad_to_multiple_of=64, mean_resizing=False)
    model.loss_type = "ForCausalLM"  # otherwise a warning breaks the compiled graph
    return model


def hf_trainer(
    name: str,
    config: GPTConfig,
    ids: Tensor,
    *,
    micro_batch: int,
    accumulation: int = 1,
    pad_vocab: bool = True,
    adapt: Callable[[Any], Any] = lambda model: model,
    **settings: Any,
) -> Implementation:
    """Return Hugging Face's Trainer with `HF_SETTINGS` and further `settings`, for a model changed by `adapt`."""
    settings = HF_SETTINGS | settings

    def build() -> RunSteps:
        import transformers

        class TimerCallback(transformers.TrainerCallback):
            timer: StepTimer

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                control.should_training_stop = self.timer.tick()

        accelerate_state, callback = IsolatedAccelerate(), TimerCallback()
        with accelerate_state:
            # Static shapes: otherwise a second model in this process would be compiled with dynamic ones.
            os.environ["ACCELERATE_DYNAMO_USE_DYNAMIC"] = "false"
            arguments = transformers.TrainingArguments(
                output_dir=temporary_folder(),
                per_device_train_batch_size=micro_batch,
                gradient_accumulation_steps=accumulation,
                max_steps=1_000_000,
                learning_rate=SETTINGS["lr"],
                adam_beta2=SETTINGS["betas"][1],
                weight_decay=0.1,
                max_grad_norm=1.0,
                use_cpu=not ON_GPU,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                **settings,
            )
            rows = ids[: len(ids) // config.block_size * config.block_size].view(-1, config.block_size)
            dataset = [{"input_ids": row, "labels": row} for row in rows]
            model = adapt(hf_model(config, pad_vocab=pad_vocab))
            trainer = transformers.Trainer(model, arguments, train_dataset=dataset, callbacks=[callback])

        def run_steps(timer: StepTimer) -> None:
            callback.timer = timer
            with accelerate_state, silent():
                trainer.train()

        return run_steps

    vocabulary = "vocabulary padded to a multiple of 64" if pad_vocab else f"vocabulary of {config.vocab_size:,}"
    described = ", ".join(f"{key}={value}" for key, value in settings.items())
    return Implementation(name, build, f"{vocabulary}, attn_implementation=sdpa, {described}")


# --- llm.c


def llmc(
    folder: Path | None, config: GPTConfig, ids: Tensor, *, micro_batch: int, accumulation: int, flags: str
) -> Implementation:
    """Return llm.c's `train_gpt2cu`. Each measurement runs the program and reads the step times that it prints."""

    def build() -> RunSteps:
        if folder is None:
            raise SystemExit("Pass a folder with a built train_gpt2cu: --llmc FOLDER.")
        program = (folder / "train_gpt2cu").resolve()
        data = temporary_folder() / "tokens.bin"
        header = np.zeros(256, dtype=np.int32)
        header[:3] = 20240520, 1, len(ids)  # magic number, version and token count
        data.write_bytes(header.tobytes() + ids.numpy().astype(np.uint16).tobytes())
        tokens = micro_batch * accumulation * config.block_size
        # Never validates (it divides by the value of -v), samples or saves.
        fixed = f"-e d{config.n_layer} -b {micro_batch} -t {config.block_size} -d {tokens} -c 0.1 -l {SETTINGS['lr']}"
        command = [str(program), "-i", str(data), "-j", str(data), *fixed.split(), *flags.split()]
        command += "-v 1000000 -m 1 -s 0 -h 0 -n 0 -z 0".split()

        def run_steps(timer: StepTimer) -> None:
            steps = timer.warmup + timer.steps
            process = subprocess.run(
                [*command, "-x", str(steps)], cwd=program.parent, capture_output=True, text=True, check=False
            )
            times = [float(match) for match in re.findall(r"\| ([\d.]+) ms \|", process.stdout)]
            if len(times) < steps:
                output = process.stdout[-2000:] + process.stderr[-2000:]
                raise SystemExit(f"llm.c failed with exit code {process.returncode}:\n{output}")
            timer.seconds = math.fsum(times[timer.warmup :]) / timer.steps / 1000

        return run_steps

    return Implementation("llm.c", build, f"bfloat16, vocabulary padded to 50,304, {flags}")
