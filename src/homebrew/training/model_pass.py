"""The forward and backward pass of a micro-batch, which can be replayed as a CUDA graph."""

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from homebrew.model.hooks import has_global_hooks, module_hooks
from homebrew.model.language_model import LossFunction
from homebrew.training.cuda_graph import CudaGraph


class ModelPass:
    """Runs the forward and backward pass of a micro-batch.

    Args:
        model: Model as `Accelerator.prepare` returned it.
        accelerator: The run's Accelerator.
        loss_function: Computes the loss of a micro-batch.
        capture: Run the passes as a CUDA graph, as long as a replay does the same as a pass. Gradients must then be
            zeroed, not set to None, between steps.
    """

    def __init__(
        self, model: nn.Module, accelerator: Accelerator, loss_function: LossFunction, *, capture: bool
    ) -> None:
        self._model = model
        self._accelerator = accelerator
        self._loss_function = loss_function
        self._graph = CudaGraph(self._run, self._dependencies) if capture else None
        self._parameters = list(model.parameters())
        self._modules = list(model.modules())
        self._hooks = [hooks for module in self._modules for hooks in module_hooks(module)]

    def __call__(self, input_ids: Tensor, targets: Tensor, gradient: Tensor) -> Tensor:
        """Run a pass, which adds to the parameters' gradients, and return its loss.

        Args:
            input_ids: Token ids, (B, T), int64.
            targets: Ids of the next tokens, (B, T), int64.
            gradient: Gradient of the step's loss by the loss of this pass, a scalar.
        """
        run = self._run if self._graph is None or self._must_run() else self._graph
        return run(input_ids, targets, gradient)

    def stop_capturing(self) -> None:
        """Run each pass from now on: modules have been added, replaced or removed."""
        self._graph = None

    def reset(self) -> None:
        """Prepare for a run.

        PyTorch keeps the autograd nodes that write `grad` as long as a loss refers to them, such as one in a notebook.
        They belong to the stream that this loss was computed on, for which a capture cannot wait.
        """
        if self._graph is not None:
            for parameter in self._parameters:
                data = parameter.data
                parameter.data = data.new_empty(0, dtype=torch.complex64)  # another dtype needs another node
                parameter.data = data

    def _run(self, input_ids: Tensor, targets: Tensor, gradient: Tensor) -> Tensor:
        loss = self._loss_function(self._model, input_ids, targets)
        self._accelerator.backward(loss, gradient=gradient)
        return loss.detach()

    def _must_run(self) -> bool:
        """Return whether a pass cannot be captured, or a replay would leave out a part of it, such as hooks."""
        return (
            any(self._hooks)
            or any(p._backward_hooks or p._post_accumulate_grad_hooks for p in self._parameters)
            or has_global_hooks()
            or torch.is_anomaly_enabled()  # waits for the device to look for NaN
            or any(vars(m).get("activation_checkpointing") for m in self._modules)  # looks at the random state
            or any(m._compiled_call_impl is not None for m in self._modules)  # may replay CUDA graphs itself
        )

    def _dependencies(self) -> list[object]:
        """Return everything else that a captured pass reads or writes, such as the rate of a dropout."""
        tensors: list[object] = [tensor for p in self._parameters for tensor in (p, p.grad, p.requires_grad)]
        attributes = [value for m in self._modules for value in vars(m).values() if not isinstance(value, dict)]
        divisor = self._accelerator.gradient_accumulation_steps
        return [*tensors, *attributes, *self._model.buffers(), divisor]
