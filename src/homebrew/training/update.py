"""What a step does with its gradients: they are clipped, the guard judges, the optimizer moves the weights."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from homebrew.training.guard import Guard
from homebrew.training.sharding import whole


class Update:
    """Clipping, judgement and the optimizer's step, one after the other or as one CUDA graph.

    Args:
        parameters: those that train.
        optimizer: over them; under a scaler Accelerate's, which knows it.
        guard: of this optimizer.
        accelerator: of the run.
        max_grad_norm: which gradients are clipped to.
        as_graph: on one CUDA device, with a fused optimizer and no scaler.
        in_place: keep the gradients' memory, and zero it, rather than drop them: they are summed over micro-batches
            whose backward pass is a CUDA graph, in whose own memory the next replay would overwrite them.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        optimizer: torch.optim.Optimizer,
        guard: Guard,
        accelerator: Accelerator,
        *,
        max_grad_norm: float,
        as_graph: bool,
        in_place: bool,
    ) -> None:
        self._parameters = parameters
        self._optimizer = optimizer
        self._in_place = in_place
        self._guard = guard
        self._accelerator = accelerator
        self._max_grad_norm = max_grad_norm
        self._update = _Graph(self._apply, parameters, optimizer, accelerator.device) if as_graph else self._apply

    def begin(self) -> None:
        """Before a run's first backward pass: no gradients, whatever was there."""
        self._guard.optimizer.zero_grad(set_to_none=True)
        if self._in_place:
            for parameter in self._parameters:
                parameter.grad = torch.zeros_like(parameter)

    def __call__(self, step: int, loss: Tensor) -> Tensor:
        """Update the weights, and use up the gradients.

        Args:
            step: counted from 0.
            loss: of the step, a float scalar, the same on every process.

        Returns:
            The gradients' norm before clipping, a float32 scalar on the device.
        """
        verdict = self._update(loss)
        self._guard.record(step, verdict)
        self._guard.optimizer.zero_grad(set_to_none=not self._in_place)
        return verdict[3]

    def _apply(self, loss: Tensor) -> Tensor:
        """Returns the guard's verdict."""
        self._accelerator.unscale_gradients()
        grad_norm = whole(clip_grad_norm_(self._parameters, self._max_grad_norm))
        verdict = self._guard.judge(loss, grad_norm)
        if self._guard.lets_pass(verdict) or self._accelerator.scaler is not None:
            self._optimizer.step()
        return verdict


class _Graph:
    """An update as one CUDA graph, for Python launches its hundred kernels more slowly than a GPU runs them.

    A graph knows tensors by where they lie, and numbers by what they were. So it is captured once they are the same
    as a step before, and again when one has changed; in between the update is launched kernel by kernel.
    """

    def __init__(
        self,
        update: Callable[[Tensor], Tensor],
        parameters: Sequence[Tensor],
        optimizer: torch.optim.Optimizer,
        device: torch.device,
    ) -> None:
        self._update = update
        self._parameters = parameters
        self._optimizer = optimizer
        self._loss = torch.zeros((), device=device)
        self._rates = [torch.zeros((), device=device) for _ in optimizer.param_groups]
        self._known: list[object] = []
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, loss: Tensor) -> Tensor:
        """The update's verdict."""
        with self._rates_on_device():
            self._loss.copy_(loss)
            known = self._what_it_knows()
            if known != self._known:
                self._known, self._graph = known, None
                return self._update(self._loss)
            if self._graph is None:
                self._graph = self._capture()
        self._graph.replay()
        return self._verdict.clone()  # the next replay overwrites it

    @contextmanager
    def _rates_on_device(self) -> Iterator[None]:
        """The learning rates change with every step: they are read from the device, in a graph or not."""
        groups = self._optimizer.param_groups
        rates = [group["lr"] for group in groups]
        try:
            for group, rate in zip(groups, self._rates, strict=True):
                group["lr"] = rate.fill_(group["lr"])
            yield
        finally:
            for group, number in zip(groups, rates, strict=True):
                group["lr"] = number

    def _what_it_knows(self) -> list[object]:
        state = self._optimizer.state
        tensors = [tensor for p in self._parameters for tensor in (p, p.grad, *state[p].values())]
        numbers = [group[key] for group in self._optimizer.param_groups for key in group if key not in ("params", "lr")]
        return [None if tensor is None else tensor.data_ptr() for tensor in tensors] + numbers

    def _capture(self) -> torch.cuda.CUDAGraph:
        """Launches nothing: a graph's first replay is the first time it is run."""
        groups, graph = self._optimizer.param_groups, torch.cuda.CUDAGraph()
        for group in groups:
            group["capturable"] = True
        try:
            # The checkpoint's writer and a data loader's thread may use the GPU meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._verdict = self._update(self._loss)
        finally:
            for group in groups:
                group["capturable"] = False
        return graph
