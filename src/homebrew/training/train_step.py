"""One optimizer step: forward and backward passes, then an update by clipped gradients that the guard allows."""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from homebrew.data.loader import Batch
from homebrew.distributed.collectives import micro_batch_weights
from homebrew.distributed.fsdp import full_tensor, keeps_weights_gathered, uses_fsdp
from homebrew.errors import TrainingError
from homebrew.training.cuda_graph import CudaGraph
from homebrew.training.nan_guard import NanGuard


class TrainStep:
    """Takes optimizer steps. With a fused optimizer nothing in a step waits for the device.

    Args:
        model: Model as `Accelerator.prepare` returned it.
        optimizer: Optimizer over the model's parameters; under a gradient scaler the one `prepare` returned.
        guard: Guard of the same optimizer.
        accelerator: The run's Accelerator.
        max_grad_norm: Gradients are clipped to this global norm.
        accumulate_in_place: Keep the gradients' memory between steps and zero it. Needed when the passes are CUDA
            graphs and gradients are accumulated: a graph's gradients lie in its own memory, where the next replay
            would overwrite their sum. A parameter that takes no part in a pass then has a gradient of zeros, so that
            its weights decay.
        capture_update: Replay the update as a CUDA graph: on a GPU, with a fused optimizer and without a gradient
            scaler. A replay calls no hooks.
    """

    def __init__(
        self,
        model: Any,  # noqa: ANN401 - a module, with FSDP's methods under FSDP
        optimizer: torch.optim.Optimizer,
        guard: NanGuard,
        accelerator: Accelerator,
        *,
        max_grad_norm: float,
        accumulate_in_place: bool = False,
        capture_update: bool = False,
    ) -> None:
        self._model = model
        self._all_parameters = list(model.parameters())
        self._parameters = [parameter for parameter in self._all_parameters if parameter.requires_grad]
        self._optimizer = optimizer
        self._guard = guard
        self._accelerator = accelerator
        self._max_grad_norm = max_grad_norm
        self._keeps_weights_gathered = keeps_weights_gathered(accelerator)
        self._accumulate_in_place = accumulate_in_place
        self._learning_rates = [
            torch.zeros((), device=accelerator.device) for _ in optimizer.param_groups if capture_update
        ]
        self._update = (
            CudaGraph(self._apply_with_device_learning_rates, self._graph_dependencies)
            if capture_update
            else self._apply
        )
        self._is_incomplete = False  # gradients of a part of a step are left

    def start(self) -> None:
        """Clear the gradients before a run's first step.

        Raises:
            TrainingError: An earlier step failed under FSDP, which may still hold half a gradient.
        """
        if self._is_incomplete and uses_fsdp(self._accelerator):
            raise TrainingError("A step was interrupted, after which FSDP cannot continue. Build a new Trainer.")
        self._is_incomplete = False
        self._guard.optimizer.zero_grad(set_to_none=True)

    def __call__(self, micro_batches: Sequence[Batch]) -> Tensor:
        """Take one step.

        Args:
            micro_batches: This rank's (input_ids, targets), each (B, T), int64.

        Returns:
            The guard's verdict (`NanGuard.judge`), on the device. Its loss is the mean over the step's scored targets
            on all ranks; its gradient norm is the one before clipping.
        """
        self._is_incomplete = True
        if self._accumulate_in_place:
            self._allocate_gradients()
        loss = self._accumulate(micro_batches)
        for tensor, group in zip(self._learning_rates, self._optimizer.param_groups, strict=False):
            tensor.fill_(group["lr"])
        verdict = self._update(loss)
        self._guard.optimizer.zero_grad(set_to_none=not self._accumulate_in_place)
        self._is_incomplete = False
        return verdict

    def _accumulate(self, micro_batches: Sequence[Batch]) -> Tensor:
        """Run forward and backward passes, synchronizing gradients in the last; return the step's loss."""
        accelerator = self._accelerator
        accelerator.gradient_accumulation_steps = len(micro_batches)  # shared by all Accelerators of a process
        weights = micro_batch_weights(accelerator, micro_batches)  # the mean of micro-batch means would be wrong
        scale = accelerator.num_processes * len(micro_batches)  # Accelerate and DDP divide by this
        losses = []
        for (input_ids, targets), weight in zip(micro_batches, weights, strict=True):
            with accelerator.accumulate(self._model):
                if self._keeps_weights_gathered:
                    self._model.set_reshard_after_backward(accelerator.sync_gradients)
                loss: Tensor = self._model(input_ids, targets)
                accelerator.backward(loss, gradient=weight * scale)
            losses.append(loss.detach() * weight)  # a copy: the next replay of a CUDA graph overwrites its loss
        total: Tensor = accelerator.reduce(torch.stack(losses).sum(), "sum")
        return total

    def _allocate_gradients(self) -> None:
        for parameter in self._all_parameters:
            if not parameter.requires_grad:
                parameter.grad = None  # else the optimizer would move a parameter that a callback has frozen
            elif parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def _apply(self, loss: Tensor) -> Tensor:
        """Clip the gradients, judge the step and update the weights; return the verdict."""
        self._accelerator.unscale_gradients()
        grad_norm = full_tensor(clip_grad_norm_(self._parameters, self._max_grad_norm))
        verdict = self._guard.judge(loss, grad_norm)
        if self._guard.allows_update(verdict) or self._accelerator.scaler is not None:
            self._optimizer.step()
        return verdict

    def _apply_with_device_learning_rates(self, loss: Tensor) -> Tensor:
        """Do the same with learning rates read from the device, because they change with every step."""
        groups = self._optimizer.param_groups
        learning_rates = [group["lr"] for group in groups]
        is_capturing = loss.is_cuda and torch.cuda.is_current_stream_capturing()
        try:
            for group, tensor in zip(groups, self._learning_rates, strict=True):
                group["lr"], group["capturable"] = tensor, is_capturing  # PyTorch warns if set without need
            return self._apply(loss)
        finally:
            for group, learning_rate in zip(groups, learning_rates, strict=True):
                group["lr"], group["capturable"] = learning_rate, False

    def _graph_dependencies(self) -> list[object]:
        """Return everything the captured update reads or writes; a change of any makes it be captured again."""
        state, groups = self._optimizer.state, self._optimizer.param_groups
        tensors = [tensor for p in self._parameters for tensor in (p, p.grad, *state.get(p, {}).values())]
        return tensors + [group[key] for group in groups for key in group if key not in ("params", "lr")]
