"""Those that are compared: homebrew's Trainer, plain loops, Hugging Face's Trainer, nanoGPT and llm.c."""

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
from contextlib import nullcontext
from itertools import cycle
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from alternating import DEVICE, Clock, Stretch
from plain_gpt import PlainGPT
from torch import Tensor, nn

from homebrew import GPT, Callback, GPTConfig, TokenDataset, Trainer, TrainerConfig

Batches = Iterator[tuple[Tensor, Tensor]]
SETTINGS: dict[str, Any] = {"lr": 6e-4, "betas": (0.9, 0.95)}
"""AdamW's, on every side."""


def random_ids(count: int, vocab_size: int, seed: int = 0) -> Tensor:
    """Token ids to train on where only the time matters, (count,), int64."""
    return torch.randint(vocab_size, (count,), generator=torch.Generator().manual_seed(seed))


def device_batches(ids: Tensor, block_size: int, micro_batch: int) -> Batches:
    """The same few batches over and over, already on the device: the least a loop can spend on data."""
    rows = ids[: len(ids) // (block_size + 1) * (block_size + 1)].view(-1, block_size + 1)
    chunks = rows[: len(rows) // micro_batch * micro_batch].to(DEVICE).split(micro_batch)
    return cycle([(chunk[:, :-1].contiguous(), chunk[:, 1:].contiguous()) for chunk in chunks])


def temporary_folder() -> Path:
    """A folder that is there until the process ends."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


class OwnAccelerate:
    """Accelerate's process-wide state, one for each Trainer in the process: enter to build it, and to let it run."""

    _classes = (PartialState, AcceleratorState, GradientState)

    def __init__(self) -> None:
        self._states: list[dict[str, Any]] = [{} for _ in self._classes]

    def __enter__(self) -> None:
        for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
            del os.environ[name]  # what the last one told the next
        self._swap()

    def __exit__(self, *_: object) -> None:
        self._swap()

    def _swap(self) -> None:
        for index, kind in enumerate(self._classes):
            other = dict(kind._shared_state)
            kind._shared_state.clear()
            kind._shared_state.update(self._states[index])
            self._states[index] = other


# --- homebrew


class _Over(Exception):  # noqa: N818 - no error
    """A stretch is over; a run that is stopped in another way saves a checkpoint."""


class _Ticking(Callback):
    """Breaks a run off at its stretch's end."""

    def __init__(self) -> None:
        self.clock: Clock

    def on_step_end(self, trainer: Trainer) -> None:
        if self.clock.tick():
            raise _Over


def homebrew_trainer(model: GPT, ids: Tensor, **settings: Any) -> Stretch:
    """`Trainer.train` as a user calls it, with the settings a user gets."""
    own, ticking = OwnAccelerate(), _Ticking()
    folder = temporary_folder()
    dataset = TokenDataset.from_tokens(ids, model.config.block_size, vocab_size=model.config.vocab_size)
    # From the first step on it learns as fast as the others do: how much power the GPU draws, and so how fast it runs,
    # depends on the numbers it multiplies.
    defaults = {"max_steps": 1_000_000, "warmup_steps": 0, "save_every": None}
    config = TrainerConfig(output_dir=folder, **{**defaults, **settings})
    with own:
        trainer = Trainer(model, dataset, config=config, callbacks=[ticking])

    def stretch(clock: Clock) -> None:
        ticking.clock = clock
        with own, contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(_Over), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it goes on with the weights it has is what is wanted
            trainer.train()

    return stretch


# --- plain loops


def plain_loop(
    loss_of: Callable[[Tensor, Tensor], Tensor],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    *,
    accumulation: int = 1,
    autocast: bool = True,
    read_loss_every: int = 0,
) -> Stretch:
    """A training loop written by hand: accumulate, clip to 1, step.

    Args:
        loss_of: the model's mean loss, compiled or not.
        model: whose parameters are trained.
        optimizer: over them.
        batches: (input_ids, targets) on the device.
        accumulation: micro-batches in a step.
        autocast: run in bfloat16.
        read_loss_every: steps between two readings of the loss, which wait for the device; never if 0.
    """
    count = 0

    def stretch(clock: Clock) -> None:
        nonlocal count
        while True:
            for _ in range(accumulation):
                input_ids, targets = next(batches)
                with torch.autocast(DEVICE.type, torch.bfloat16) if autocast else nullcontext():
                    loss = loss_of(input_ids, targets) / accumulation
                loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            count += 1
            if read_loss_every and count % read_loss_every == 0:
                loss.item()
            if clock.tick():
                return

    return stretch


def adamw(model: nn.Module, *, fused: bool) -> torch.optim.AdamW:
    """AdamW with decay on matrices only."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, **SETTINGS, fused=fused)


def compiled(model: nn.Module, wanted: bool, mode: str | None = None) -> Callable[..., Any]:
    """The model, through torch.compile if wanted."""
    if DEVICE.type == "cuda":
        torch.set_float32_matmul_precision("high")
    # Shapes are fixed, as they would be in a process that runs one side only: another side's are not to make them vary.
    return torch.compile(model, mode=mode, dynamic=False) if wanted else model


def bare_loop(
    model: GPT,
    ids: Tensor,
    *,
    micro_batch: int,
    accumulation: int = 1,
    compile_model: bool,
    autocast: bool,
    mode: str | None = None,
) -> Stretch:
    """The least one can write around homebrew's own model."""
    model = model.to(DEVICE)
    batches = device_batches(ids, model.config.block_size, micro_batch)
    optimizer = adamw(model, fused=True)
    loss_of = compiled(model, compile_model, mode)
    return plain_loop(loss_of, model, optimizer, batches, accumulation=accumulation, autocast=autocast)


def seed_loop(shape: GPTConfig, ids: Tensor, *, micro_batch: int = 8, accumulation: int) -> Stretch:
    """The last cells of the notebook homebrew grew out of: it waits for the device at every step."""
    on_gpu = DEVICE.type == "cuda"
    model = PlainGPT(shape).to(DEVICE)
    batches = device_batches(ids, shape.block_size, micro_batch)
    loop = plain_loop(
        compiled(model, on_gpu),
        model,
        adamw(model, fused=on_gpu),
        batches,
        accumulation=accumulation,
        autocast=on_gpu,
        read_loss_every=1,
    )
    return loop


# --- nanoGPT


def nanogpt_model(folder: Path | None, shape: GPTConfig) -> tuple[nn.Module, torch.optim.Optimizer]:
    """NanoGPT's model (`bias=True`) and optimizer from a folder of it, or our rewrite of them."""
    on_gpu = DEVICE.type == "cuda"
    if folder is None:
        model: Any = PlainGPT(shape, gelu="none", pad_vocab=shape.vocab_size > 1000).to(DEVICE)
        return model, adamw(model, fused=on_gpu)
    theirs = _import_file(folder / "model.py")
    names = ("n_layer", "n_head", "n_embd", "block_size", "dropout")
    vocab_size = 50_304 if shape.vocab_size == 50_257 else shape.vocab_size
    with contextlib.redirect_stdout(io.StringIO()):
        fields = {name: getattr(shape, name) for name in names}
        model = theirs.GPT(theirs.GPTConfig(vocab_size=vocab_size, bias=True, **fields)).to(DEVICE)
        return model, model.configure_optimizers(0.1, SETTINGS["lr"], SETTINGS["betas"], DEVICE.type)


def nanogpt_loop(
    folder: Path | None,
    shape: GPTConfig,
    ids: Tensor,
    *,
    micro_batch: int,
    accumulation: int = 1,
    log_every: int = 10,
) -> Stretch:
    """NanoGPT's train.py: its way to make batches, compiled bfloat16 on a GPU, plain float32 elsewhere."""
    on_gpu = DEVICE.type == "cuda"
    if on_gpu:
        torch.backends.cuda.matmul.allow_tf32 = True
    model, optimizer = nanogpt_model(folder, shape)
    run = compiled(model, on_gpu)

    def loss_of(input_ids: Tensor, targets: Tensor) -> Tensor:
        result = run(input_ids, targets)
        loss: Tensor = result[1] if isinstance(result, tuple) else result
        return loss

    batches = nanogpt_batches(ids, shape.block_size, micro_batch)
    return plain_loop(
        loss_of, model, optimizer, batches, accumulation=accumulation, autocast=on_gpu, read_loss_every=log_every
    )


def nanogpt_batches(ids: Tensor, block_size: int, micro_batch: int) -> Batches:
    """As train.py's `get_batch` makes them: windows at random places of a memory-mapped file."""
    path = temporary_folder() / "train.bin"
    ids.numpy().astype(np.uint16).tofile(path)
    while True:
        data = np.memmap(path, dtype=np.uint16, mode="r")
        starts = torch.randint(len(data) - block_size, (micro_batch,)).tolist()
        x = torch.stack([torch.from_numpy(data[i : i + block_size].astype(np.int64)) for i in starts])
        y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + block_size].astype(np.int64)) for i in starts])
        if DEVICE.type == "cuda":
            x, y = x.pin_memory().to(DEVICE, non_blocking=True), y.pin_memory().to(DEVICE, non_blocking=True)
        yield x, y


def _import_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"other_{path.parent.name}_{path.stem}", path)
    if spec is None or spec.loader is None or not path.exists():
        raise SystemExit(f"There is no {path}: name a folder with a copy of nanoGPT.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- Hugging Face


def hf_model(shape: GPTConfig) -> Any:
    """Transformers' GPT-2 with random weights; its own vocabulary, not padded."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=shape.vocab_size,
        n_positions=shape.block_size,
        n_embd=shape.n_embd,
        n_layer=shape.n_layer,
        n_head=shape.n_head,
        resid_pdrop=shape.dropout,
        embd_pdrop=shape.dropout,
        attn_pdrop=shape.dropout,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # left unset, a warning of theirs breaks the compiled graph in two
    return model


class _Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self, ids: Tensor, block_size: int) -> None:
        self.rows = ids[: len(ids) // block_size * block_size].view(-1, block_size)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def hf_trainer(
    model: Any, ids: Tensor, block_size: int, *, micro_batch: int, accumulation: int = 1, lr: float = 6e-4
) -> Stretch:
    """Hugging Face's Trainer: bfloat16 and torch_compile on a GPU, fused AdamW."""
    import transformers

    own = OwnAccelerate()
    on_gpu = DEVICE.type == "cuda"
    folder = temporary_folder()

    class Ticking(transformers.TrainerCallback):
        clock: Clock

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = self.clock.tick()

    ticking = Ticking()
    with own:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=accumulation,
            max_steps=1_000_000,
            learning_rate=lr,
            adam_beta2=0.95,
            weight_decay=0.1,
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
            bf16=on_gpu,
            use_cpu=not on_gpu,
            torch_compile=on_gpu,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        dataset = _Rows(ids, block_size)
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=dataset, callbacks=[ticking])

    def stretch(clock: Clock) -> None:
        ticking.clock = clock
        with own, contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.train()

    return stretch


# --- llm.c


def llmc(folder: Path, shape: GPTConfig, ids: Tensor, *, micro_batch: int, accumulation: int) -> Stretch:
    """llm.c's built `train_gpt2cu`: each stretch starts it anew and reads the times it prints."""
    data = temporary_folder() / "tokens.bin"
    header = np.zeros(256, dtype=np.int32)
    header[:3] = 20240520, 1, len(ids)  # its data loader's magic number, version and count
    data.write_bytes(header.tobytes() + ids.numpy().astype(np.uint16).tobytes())
    tokens = micro_batch * accumulation * shape.block_size

    def stretch(clock: Clock) -> None:
        flags = {
            "-i": data,
            "-j": data,
            "-e": f"d{shape.n_layer}",
            "-b": micro_batch,
            "-t": shape.block_size,
            "-d": tokens,
            "-x": clock.warmup + clock.steps,
            "-r": 0,  # recompute nothing
            "-c": 0.1,
            "-l": SETTINGS["lr"],
            "-v": 1_000_000,  # it divides by this
            "-m": 1,
            "-s": 0,
            "-h": 0,
            "-n": 0,
            "-z": 0,
        }
        command = [str(folder / "train_gpt2cu"), *(str(word) for pair in flags.items() for word in pair)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=os.environ, check=False)
        times = [float(found) for found in re.findall(r"\| ([\d.]+) ms \|", done.stdout)]
        if len(times) < clock.warmup + clock.steps:
            raise SystemExit(f"llm.c ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        clock.seconds = math.fsum(times[clock.warmup :]) / clock.steps / 1000

    return stretch
