"""An optimizer step: passes over its micro-batches, then an update by clipped gradients that the guard lets through."""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from homebrew.data.loader import Batch
from homebrew.distributed.collectives import target_shares
from homebrew.distributed.fsdp import full_tensor, keeps_weights_gathered
from homebrew.training.cuda_graph import CudaGraph
from homebrew.training.nan_guard import NanGuard


class TrainStep:
    """Takes a run's optimizer steps; with a fused optimizer nothing in it waits for the device.

    Args:
        model: as `prepare` returned it.
        optimizer: over its parameters; under a scaler Accelerate's, which knows it.
        guard: of the same optimizer.
        accelerator: of the run.
        max_grad_norm: which gradients are clipped to.
        sums_in_place: keep the memory of the gradients and zero it, for passes that are CUDA graphs: in a graph's own
            memory, where its gradients are, the next replay would overwrite their sum. A parameter that takes no part
            in a pass has a gradient of zeros then, and its weights decay.
        update_as_graph: replay the update as one; on a GPU, with a fused optimizer and no scaler. A replay calls no
            hooks.
    """

    def __init__(
        self,
        model: Any,  # noqa: ANN401 - a module, with FSDP's methods under FSDP
        optimizer: torch.optim.Optimizer,
        guard: NanGuard,
        accelerator: Accelerator,
        *,
        max_grad_norm: float,
        sums_in_place: bool = False,
        update_as_graph: bool = False,
    ) -> None:
        self._model = model
        self._weights = list(model.parameters())
        self._parameters = [parameter for parameter in self._weights if parameter.requires_grad]
        self._optimizer = optimizer
        self._guard = guard
        self._accelerator = accelerator
        self._max_grad_norm = max_grad_norm
        self._stays_gathered = keeps_weights_gathered(accelerator)
        self._sums_in_place = sums_in_place
        self._rates = [torch.zeros((), device=accelerator.device) for _ in optimizer.param_groups if update_as_graph]
        self._update = CudaGraph(self._apply_as_graph, self._touched) if update_as_graph else self._apply

        self.broken_off = False
        """Whether the last step did not come to its end: gradients of a part of it are there."""

    def begin(self) -> None:
        """Before a run's first step: no gradients, whatever was there."""
        self.broken_off = False
        self._guard.optimizer.zero_grad(set_to_none=True)

    def __call__(self, micro_batches: Sequence[Batch]) -> Tensor:
        """Take a step.

        Args:
            micro_batches: this process's (input_ids, targets), each (B, T), int64.

        Returns:
            What the guard said of it (`NanGuard.judge`), on the device: its loss is the mean over the step's scored
            targets on all processes, its norm the gradient's before clipping.
        """
        accelerator, self.broken_off = self._accelerator, True
        accelerator.gradient_accumulation_steps = len(micro_batches)  # one for all of a process's Accelerators
        shares = target_shares(accelerator, micro_batches)  # a mean of means would be wrong
        scale = accelerator.num_processes * len(micro_batches)  # which Accelerate and DDP divide by
        for parameter in self._weights if self._sums_in_place else ():
            if not parameter.requires_grad:
                parameter.grad = None  # or the optimizer would move what a callback has frozen
            elif parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        losses = []
        for (input_ids, targets), share in zip(micro_batches, shares, strict=True):
            with accelerator.accumulate(self._model):
                if self._stays_gathered:
                    self._model.set_reshard_after_backward(accelerator.sync_gradients)
                loss: Tensor = self._model(input_ids, targets)
                accelerator.backward(loss, gradient=share * scale)
            losses.append(loss.detach() * share)  # a copy: the next replay of a graph takes the place of its loss
        loss = accelerator.reduce(torch.stack(losses).sum(), "sum")

        for rate, group in zip(self._rates, self._optimizer.param_groups, strict=False):
            rate.fill_(group["lr"])
        verdict = self._update(loss)
        self._guard.optimizer.zero_grad(set_to_none=not self._sums_in_place)
        self.broken_off = False
        return verdict

    def _apply(self, loss: Tensor) -> Tensor:
        """Clip, judge, and move the weights; returns the guard's verdict."""
        self._accelerator.unscale_gradients()
        grad_norm = full_tensor(clip_grad_norm_(self._parameters, self._max_grad_norm))
        verdict = self._guard.judge(loss, grad_norm)
        if self._guard.lets_pass(verdict) or self._accelerator.scaler is not None:
            self._optimizer.step()
        return verdict

    def _apply_as_graph(self, loss: Tensor) -> Tensor:
        """The same with learning rates that are read from the device: they change with every step."""
        groups = self._optimizer.param_groups
        rates = [group["lr"] for group in groups]
        captured = loss.is_cuda and torch.cuda.is_current_stream_capturing()
        try:
            for group, rate in zip(groups, self._rates, strict=True):
                group["lr"], group["capturable"] = rate, captured  # PyTorch warns where it is without need
            return self._apply(loss)
        finally:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"], group["capturable"] = rate, False

    def _touched(self) -> list[object]:
        state, groups = self._optimizer.state, self._optimizer.param_groups
        tensors = [tensor for p in self._parameters for tensor in (p, p.grad, *state.get(p, {}).values())]
        return tensors + [group[key] for group in groups for key in group if key not in ("params", "lr")]
