"""One optimizer step: forward and backward passes, gradient clipping, the guard, and the optimizer."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from homebrew.checkpoint.optimizer_state import check_state
from homebrew.data.loader import Batch
from homebrew.distributed.collectives import micro_batch_weights
from homebrew.distributed.fsdp import full_tensor, keeps_weights_gathered, uses_fsdp
from homebrew.errors import TrainingError
from homebrew.model.language_model import LossFunction
from homebrew.model.lora import lora_layers
from homebrew.optim.combined import class_names, members
from homebrew.training.cuda_graph import CudaGraph
from homebrew.training.model_pass import ModelPass
from homebrew.training.nan_guard import NanGuard
from homebrew.training.optimizer import check_trainable


class TrainStep:
    """Takes optimizer steps. With a fused optimizer nothing in a step waits for the device.

    Args:
        model: Model as `Accelerator.prepare` returned it.
        optimizer: Optimizer over the model's parameters; under a gradient scaler the one `prepare` returned.
        guard: Guard of the same optimizer.
        accelerator: The run's Accelerator.
        loss_function: Computes the loss of a micro-batch.
        max_grad_norm: Gradients are clipped to this global norm.
        accumulate_in_place: Keep the gradient tensors between steps and zero them, instead of setting them to None.
            Needed if gradients are accumulated over CUDA graphs, whose next replay overwrites the gradients that the
            previous one returned, and if the passes are captured. Unused parameters then have gradients of zero instead
            of None, so weight decay applies to them.
        capture_passes: Run the forward and backward passes of an uncompiled model as a CUDA graph, where possible.
        capture_update: Run the update as a CUDA graph. Needs a GPU, a fused optimizer and no gradient scaler. Optimizer
            hooks are not called when a graph is replayed.
    """

    def __init__(
        self,
        model: Any,  # noqa: ANN401 - a module, with FSDP's methods under FSDP
        optimizer: torch.optim.Optimizer,
        guard: NanGuard,
        accelerator: Accelerator,
        *,
        loss_function: LossFunction,
        max_grad_norm: float,
        accumulate_in_place: bool,
        capture_passes: bool,
        capture_update: bool,
    ) -> None:
        self._model = model
        self._named_parameters = dict(model.named_parameters())
        self._parameters = list(self._named_parameters.values())
        self._trainable = self._trainable_names()
        self._modules = [] if uses_fsdp(accelerator) else list(model.modules())  # FSDP itself replaces parameters
        self._members = [members for m in self._modules for members in (m._modules, m._parameters)]
        self._optimizer = optimizer
        self._guard = guard
        self._module_ids, self._group_ids = self._identities()
        self._accelerator = accelerator
        self._max_grad_norm = max_grad_norm
        self._keeps_weights_gathered = keeps_weights_gathered(accelerator)
        self._accumulate_in_place = accumulate_in_place
        self._pass = ModelPass(model, accelerator, loss_function, capture=capture_passes)
        self._learning_rates = [
            torch.zeros((), device=accelerator.device) for _ in optimizer.param_groups if capture_update
        ]
        self._update = (
            CudaGraph(self._apply_with_device_learning_rates, self._graph_dependencies)
            if capture_update
            else self._apply
        )
        self._is_incomplete = False  # True while gradients of an unfinished step may exist
        self._is_state_checked = False
        self._ddp_needs_all_gradients = _ddp_needs_all_gradients(accelerator)

    def reset(self) -> None:
        """Clear the gradients before a run's first step.

        Raises:
            TrainingError: An earlier step failed under FSDP, whose internal state is then undefined; or the parameters
                are not those of the Trainer's construction.
        """
        self.check_identities()
        if self._is_incomplete and uses_fsdp(self._accelerator):
            raise TrainingError("An earlier step failed, and FSDP cannot recover from that. Build a new Trainer.")
        self._is_incomplete = False
        self._guard.optimizer.zero_grad(set_to_none=True)
        self._pass.reset()

    def __call__(self, micro_batches: Sequence[Batch]) -> Tensor:
        """Take one step.

        Args:
            micro_batches: This rank's (input_ids, targets), each (B, T), int64.

        Returns:
            The step's result (see `NanGuard.check`), on the device. Its loss is the mean over the step's scored targets
            on all ranks; its gradient norm is the one before clipping.

        Raises:
            TrainingError: The parameters are not those of the Trainer's construction, or the optimizer's step failed.
            ConfigError: A parameter has been unfrozen that the optimizer does not hold; or, in the first step, the
                optimizer has state that a checkpoint cannot hold.
        """
        self.check_parameters()
        self._is_incomplete = True
        if self._accumulate_in_place:
            self._allocate_gradients()
        loss = self._accumulate(micro_batches)
        if self._ddp_needs_all_gradients:
            self._check_gradients()
        for tensor, group in zip(self._learning_rates, self._optimizer.param_groups, strict=False):
            tensor.fill_(group["lr"])
        result = self._update(loss)  # `_apply`, possibly replayed as a CUDA graph
        self._guard.optimizer.zero_grad(set_to_none=not self._accumulate_in_place)
        self._is_incomplete = False
        return result

    def check_parameters(self) -> None:
        """Check what has been changed since the last step, for example by a callback.

        Raises:
            TrainingError: A parameter has been added, replaced, removed, or, where that is not supported, frozen or
                unfrozen; or the optimizer's parameter groups have changed.
            ConfigError: No parameter is trainable, or the optimizer does not hold one that has been unfrozen.
        """
        trainable = self._trainable_names()
        if trainable != self._trainable:
            self._check_trainable(trainable)
        self.check_identities()

    def check_identities(self) -> None:
        """Check that the parameters and parameter groups are those of the Trainer's construction.

        Raises:
            TrainingError: They are not.
        """
        module_ids, group_ids = self._identities()
        if group_ids != self._group_ids:
            raise TrainingError(
                "The optimizer's parameter groups have changed since the Trainer was built, so its checkpoints would "
                "no longer fit. Build the optimizer with all groups, or build a new Trainer after each change."
            )
        if module_ids != self._module_ids:
            before = {id(parameter): name for name, parameter in self._named_parameters.items()}
            now = {id(parameter): name for name, parameter in self._model.named_parameters()}
            changed = [(before | now)[number] for number in before.keys() ^ now.keys()]
            if changed:
                raise TrainingError(
                    f"The model's parameter {min(changed).removeprefix('module.')} has been added, replaced or removed "
                    f"since the Trainer was built, but the optimizer still has the earlier parameters. Change values "
                    f"in place, for example with load_state_dict(..., assign=False), or build a new Trainer."
                )
            self._module_ids = module_ids
            self._pass.stop_capturing()

    def _identities(self) -> tuple[list[int], list[list[int]]]:
        """Return the identities of the modules' children and parameters, and of each group's parameters.

        This is several times faster than `named_parameters`.
        """
        members = chain.from_iterable(map(dict.values, self._members))
        groups = self._guard.optimizer.param_groups
        return list(map(id, members)), [list(map(id, group["params"])) for group in groups]

    def _trainable_names(self) -> set[str]:
        return {name for name, parameter in self._named_parameters.items() if parameter.requires_grad}

    def _check_trainable(self, trainable: set[str]) -> None:
        if self._accelerator.distributed_type != DistributedType.NO or lora_layers(self._model):
            changed = next(name for name in self._named_parameters if name in trainable ^ self._trainable)
            raise TrainingError(
                f"requires_grad of {changed.removeprefix('module.')} has changed since the Trainer was built, which is "
                f"not supported with DDP, FSDP or LoRA. Set it before you build the Trainer."
            )
        check_trainable(self._model, self._optimizer)
        # Compiled code computes the gradients of the parameters that were trainable, and PyTorch 2.11 may run it again
        # without looking at requires_grad.
        torch.compiler.reset()
        self._trainable = trainable

    def _accumulate(self, micro_batches: Sequence[Batch]) -> Tensor:
        """Run forward and backward passes, synchronizing gradients in the last; return the step's loss."""
        accelerator = self._accelerator
        accelerator.gradient_accumulation_steps = len(micro_batches)  # shared by all Accelerators of a process
        weights = micro_batch_weights(accelerator, micro_batches)  # their numbers of targets may differ
        scale = accelerator.num_processes * len(micro_batches)  # Accelerate and DDP divide by this
        losses = []
        for (input_ids, targets), weight in zip(micro_batches, weights, strict=True):
            with accelerator.accumulate(self._model):
                if self._keeps_weights_gathered:
                    self._model.set_reshard_after_backward(accelerator.sync_gradients)
                loss = self._pass(input_ids, targets, weight * scale)
            losses.append(loss * weight)  # a copy: the next replay of a CUDA graph overwrites its loss
        total: Tensor = accelerator.reduce(torch.stack(losses).sum(), "sum")
        return total

    def _check_gradients(self) -> None:
        """Check that DDP has reduced all gradients: it does not if a parameter has none.

        A parameter that has a gradient in some of a step's micro-batches but not in the last is not found.

        Raises:
            TrainingError: A parameter has no gradient.
        """
        names = [name for name, p in self._named_parameters.items() if p.requires_grad and p.grad is None]
        if names:
            raise TrainingError(
                f"DDP does not support parameters without gradient: {len(names)}, such as "
                f"{names[0].removeprefix('module.')}. Freeze them with requires_grad_(False), or pass accelerator="
                f"Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])."
            )

    def _allocate_gradients(self) -> None:
        for parameter in self._parameters:
            if not parameter.requires_grad:
                parameter.grad = None  # a callback has frozen it, so the optimizer must skip it
            elif parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def _apply(self, loss: Tensor) -> Tensor:
        """Clip the gradients, check the step and update the weights; return the step's result."""
        self._accelerator.unscale_gradients()
        grad_norm = full_tensor(clip_grad_norm_(self._parameters, self._max_grad_norm))
        result = self._guard.check(loss, grad_norm)
        # A gradient scaler must see every step: it skips non-finite ones itself and adjusts its scale.
        if self._guard.allows_update(result) or self._accelerator.scaler is not None:
            try:
                self._optimizer.step()
            except Exception as error:
                is_of_device = isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError)
                if is_of_device or str(error).startswith("DataLoader"):
                    raise  # the Trainer explains these
                raise TrainingError(
                    f"{class_names(self._guard.optimizer)}.step() failed: {error!r}. Use options that the optimizer "
                    f"supports for these parameters, for example fused=False, or another optimizer."
                ) from error
            if not self._is_state_checked:  # now, and not only at the first save, which may be hours later
                check_state(self._guard.optimizer)
                self._is_state_checked = not self._accelerator.optimizer_step_was_skipped  # by the gradient scaler
        return result

    def _apply_with_device_learning_rates(self, loss: Tensor) -> Tensor:
        """Like `_apply`, but with learning rates in device tensors: a CUDA graph would keep plain numbers forever."""
        groups = self._optimizer.param_groups
        learning_rates = [group["lr"] for group in groups]
        is_capturing = loss.is_cuda and torch.cuda.is_current_stream_capturing()
        try:
            for group, tensor in zip(groups, self._learning_rates, strict=True):
                group["lr"] = tensor
                if "capturable" in group:  # PyTorch warns about it outside of a capture
                    group["capturable"] = is_capturing
            return self._apply(loss)
        finally:
            for group, learning_rate in zip(groups, learning_rates, strict=True):
                group["lr"] = learning_rate
                if "capturable" in group:
                    group["capturable"] = False

    def _graph_dependencies(self) -> list[object]:
        """Return everything that the captured update reads or writes. It is captured again if any of it changes."""
        optimizers = members(self._optimizer)
        tensors = [tensor for p in self._parameters for tensor in (p, p.grad)]
        states = [value for o in optimizers for state in o.state.values() for value in state.values()]
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        return tensors + states + [group[key] for group in groups for key in group if key not in ("params", "lr")]


def _ddp_needs_all_gradients(accelerator: Accelerator) -> bool:
    """Return whether the run uses DDP without one of its options for unused parameters."""
    if accelerator.distributed_type == DistributedType.NO or uses_fsdp(accelerator):
        return False
    handler = getattr(accelerator, "ddp_handler", None)
    return handler is None or not (handler.find_unused_parameters or handler.static_graph)
