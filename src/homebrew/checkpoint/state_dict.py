"""The state of a run as named CPU tensors: weights, optimizer, update guard and random states.

Names are those of the model without wrappers, also if the model is sharded or compiled, or runs on several processes.
"""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors.torch import load, save
from torch import Tensor, nn

from homebrew.checkpoint.built_optimizer import BuiltOptimizer
from homebrew.checkpoint.checkpoint_files import TensorFiles
from homebrew.checkpoint.optimizer_state import check_optimizer_state, load_optimizer_state, state_tensors
from homebrew.checkpoint.rng_state import check_rng, restore_rng, rng_state
from homebrew.checkpoint.tensor_check import check_tensors, describe, find_non_finite, is_savable
from homebrew.distributed.collectives import broadcast_bytes, broadcast_tensors, gather_bytes
from homebrew.distributed.fsdp import full_tensor, shard_like, uses_fsdp
from homebrew.errors import CorruptCheckpoint, ModelError
from homebrew.model.lora import LoRALinear, adapter_state_dict
from homebrew.optim.averaged import AveragedOptimizer


class Stateful(Protocol):
    """An object whose state is a flat dictionary of tensors."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state."""

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Restore the state."""


class RunState:
    """The state of a run, to save and to restore. `gather`, `gather_small` and `scatter` are collective.

    Args:
        accelerator: The run's accelerator.
        model: Model without wrappers.
        optimizer: Optimizer without Accelerate's wrapper, before its first step.
        guard: The run's update guard.

    Raises:
        ModelError: A checkpoint cannot hold or restore the model.
    """

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, guard: Stateful
    ) -> None:
        _check_savable(model)
        self.accelerator = accelerator
        self.model = model
        self.optimizer = optimizer
        self.guard = guard
        self.built = BuiltOptimizer(model, optimizer)
        """The optimizer as it was built. Parameters without saved state get its state."""

    def constants(self) -> set[str]:
        """Return the names of saved weights that are not trained, such as a mask, and therefore need not be finite."""
        return {name for name, tensor in _saved_weights(self.model).items() if not tensor.requires_grad}

    @torch.no_grad()
    def gather(self) -> TensorFiles:
        """Copy the full state to the CPU of rank 0; empty on other ranks."""
        accelerator = self.accelerator
        files = self.gather_small()
        sharded = self.sharded_tensors()
        if uses_fsdp(accelerator):  # one by one, so that full tensors do not exist on the device at the same time
            for tensors in sharded.values():
                for name, tensor in tensors.items():
                    full = full_tensor(tensor)
                    tensors[name] = full.to("cpu") if accelerator.is_main_process else torch.empty(0)
        return files | _copy_to_cpu(sharded) if accelerator.is_main_process else {}

    def gather_small(self) -> TensorFiles:
        """Copy the update guard and every rank's random states to the CPU of rank 0; empty on other ranks."""
        states = gather_bytes(self.accelerator, save(rng_state()))
        if not self.accelerator.is_main_process:
            return {}
        rng = {f"rng-{i}": load(state) for i, state in enumerate(states)}
        return _copy_to_cpu({"guard": self.guard.state_dict()}) | rng

    @torch.no_grad()
    def sharded_tensors(self) -> TensorFiles:
        """Return weights and optimizer state as they are: not copied, and under FSDP sharded."""
        weights = {name: tensor.detach() for name, tensor in _saved_weights(self.model).items()}
        return {_weights_name(self.model): weights, "optimizer": state_tensors(self.model, self.optimizer)}

    @torch.no_grad()
    def scatter(self, files: TensorFiles, optimizer_state: Mapping[str, Any], *, seed: int) -> None:
        """Restore the state from rank 0's `files`, which `check` has accepted.

        Parameters without saved optimizer state get the state that they had when the optimizer was built. Ranks without
        a saved random state are seeded with `seed`.
        """
        accelerator, model = self.accelerator, self.model
        weights = _saved_weights(model)
        for name, tensor in broadcast_tensors(accelerator, files.get(_weights_name(model), {})):
            weights[name].copy_(shard_like(tensor, weights[name]))
        tensors = files.get("optimizer", {})
        load_optimizer_state(accelerator, model, self.optimizer, tensors, optimizer_state, self.built.state)
        self.guard.load_state_dict(load(broadcast_bytes(accelerator, save(files.get("guard", {})))))
        for rank in range(accelerator.num_processes):
            state = broadcast_bytes(accelerator, save(files.get(f"rng-{rank}", {})))
            if rank == accelerator.process_index:
                if saved := load(state):
                    restore_rng(saved)
                else:
                    set_seed(seed, device_specific=True)

    def reserve_staging(self) -> None:
        """Allocate the pinned memory for the copies of `gather` ahead of the first save; does nothing without a GPU.

        Page-locking takes longer than a training step, and PyTorch caches pinned memory after it has been freed.
        Sharded tensors are gathered through memory that PyTorch allocates itself.
        """
        accelerator = self.accelerator
        if accelerator.device.type == "cuda" and accelerator.is_main_process and not uses_fsdp(accelerator):
            trained = [p for p in self.model.parameters() if p.requires_grad]
            with contextlib.suppress(RuntimeError):  # not enough memory to lock: copies will be slower
                copies = range(_copies_of_trained(self.optimizer))
                _ = [torch.empty(p.shape, dtype=p.dtype, pin_memory=True) for p in trained for _ in copies]

    def check(self, path: Path, files: TensorFiles, optimizer_state: object) -> None:
        """Check that a checkpoint has the tensors that the run needs, before any state is changed.

        Args:
            path: Folder of the checkpoint.
            files: Its tensors.
            optimizer_state: Its description of the optimizer's state, any JSON value.

        Raises:
            CorruptCheckpoint: A file or tensor is missing, unknown, not finite, or of another shape or kind.
            ResumeMismatch: The optimizer does not hold a parameter whose state was saved.
        """
        weights = _weights_name(self.model)
        for name in (weights, "guard", "rng-0"):
            if name not in files:
                raise CorruptCheckpoint(f"{path} has no {name}.safetensors, which this run needs.")
        _check_weights(path / f"{weights}.safetensors", files[weights], _saved_weights(self.model))
        for file, tensors in files.items():
            if bad := find_non_finite(file, tensors, self.constants()):
                raise CorruptCheckpoint(f"{path}: {bad} in {file} has values that are not finite.")
        # Sharded checkpoints of an optimizer without state have no optimizer files.
        check_optimizer_state(path, optimizer_state, files.get("optimizer", {}), self.model, self.optimizer)
        guard = dict(files["guard"])
        num_consecutive = guard.pop("num_consecutive", None)
        if num_consecutive is None or num_consecutive.shape != () or num_consecutive.dtype != torch.int64:
            raise CorruptCheckpoint(f"{path / 'guard.safetensors'} has no int64 scalar num_consecutive.")
        check_tensors(path / "guard.safetensors", guard, {"history": (3,)})
        for name in files:
            if name.startswith("rng-"):
                check_rng(files[name])


def checkpoint_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Return the size in bytes of a checkpoint with Adam's state; Muon saves one moment less for each matrix."""
    saved = 0 if _weights_name(model) == "adapter" else 1
    trained = _copies_of_trained(optimizer)
    return sum(p.numel() * p.element_size() * (trained if p.requires_grad else saved) for p in model.parameters())


def _copies_of_trained(optimizer: torch.optim.Optimizer) -> int:
    """Return how many tensors of a trained parameter's shape are saved for it.

    These are the parameter and Adam's two moments and, for averaged weights, the average and the training weights.
    """
    return 5 if isinstance(optimizer, AveragedOptimizer) else 3


def _check_savable(model: nn.Module) -> None:
    """Raise ModelError unless a model's state dict is its parameters and buffers, and a checkpoint can hold them."""
    state = model.state_dict(keep_vars=True)
    known = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    saved = {id(value) for value in state.values()}
    added = [name for name, value in state.items() if id(value) not in known]
    dropped = [name for name, parameter in model.named_parameters() if id(parameter) not in saved]
    if added or dropped:
        problem = f"{added[0]} is not a parameter or buffer" if added else f"{dropped[0]} is missing"
        raise ModelError(
            f"{problem} in the model's state dict, so a checkpoint could not restore it. Use only parameters and "
            f"buffers, without extra state and state dict hooks."
        )
    for name, tensor in _saved_weights(model).items():
        is_strided = tensor.layout is torch.strided
        is_expanded = is_strided and any(n > 1 and s == 0 for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        if is_expanded or not is_savable(tensor):
            kind = "an expanded tensor" if is_expanded else f"a {describe(tensor)}"
            raise ModelError(
                f"The model's {name} is {kind}, which a checkpoint cannot hold or restore. Use a dense tensor of "
                f"another dtype, or the expanded one's clone(), or register it with persistent=False."
            )


def _check_weights(path: Path, saved: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Check weights. A floating-point dtype may differ from the model's, any other dtype may not."""
    buffers = {name: tensor for name, tensor in weights.items() if not tensor.is_floating_point()}
    for name, tensor in buffers.items():
        if name in saved and (saved[name].dtype, saved[name].shape) != (tensor.dtype, tensor.shape):
            raise CorruptCheckpoint(f"{path}: {name} is not {tensor.dtype} of shape {tuple(tensor.shape)}.")
    floating = {name: tensor for name, tensor in saved.items() if name not in buffers}
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    check_tensors(path, floating, {name: shape for name, shape in shapes.items() if name not in buffers.keys() & saved})


def _weights_name(model: nn.Module) -> str:
    """Return the name of the weights' file: with LoRA, the adapter is saved instead of the full model."""
    return "adapter" if any(isinstance(module, LoRALinear) for module in model.modules()) else "model"


def _saved_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers that a checkpoint holds, by name.

    Tied weights are saved under their first name. With LoRA, the adapter and other trained weights are saved.
    """
    adapter = adapter_state_dict(model).keys()
    first: dict[int, str] = {}
    return {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if first.setdefault(id(tensor), name) == name and (not adapter or name in adapter or tensor.requires_grad)
    }


def _copy_to_cpu(files: TensorFiles) -> TensorFiles:
    """Replace each tensor by a copy on the CPU. Copies from a GPU run asynchronously, into pinned memory.

    Tensors are replaced one by one, so that gathered tensors and their copies do not exist at the same time.
    """
    for tensors in files.values():
        for name, tensor in tensors.items():
            tensors[name] = tensor.detach().to("cpu", copy=True, non_blocking=tensor.is_cuda)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    for tensors in files.values():
        for name, tensor in tensors.items():
            tensors[name] = tensor.contiguous()
    return files
