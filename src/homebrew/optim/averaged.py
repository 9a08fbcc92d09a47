"""An exponential moving average of the weights, which is evaluated and saved in place of the weights."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from homebrew.distributed.fsdp import local_shard
from homebrew.errors import ConfigError
from homebrew.optim.combined import CombinedOptimizer, has_modes, parameters_of

_START_STEPS = 9
"""At step t the decay is at most t / (t + 9), so that the average of a short run forgets the initial weights."""


class AveragedOptimizer(CombinedOptimizer):
    """Optimizers that also average the weights: average = decay · average + (1 - decay) · weight after each step.

    It has the modes of schedule-free optimizers: `eval()` replaces the weights by their average. After `train()`, the
    Trainer restores the training weights.

    Args:
        optimizers: Optimizers without common parameters.
        decay: Decay of the average, below 1. The average covers about the last 1 / (1 - decay) steps and, at the start
            of a run, about a tenth of the steps taken.

    Raises:
        ConfigError: A parameter is in two optimizers, or an optimizer already has `train()` and `eval()`.
    """

    found_inf: Tensor | None = None
    """If set, a scalar on the device. While it is 1, steps change nothing."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], decay: float) -> None:
        super().__init__(optimizers)
        for optimizer in optimizers:
            if has_modes(optimizer):
                raise ConfigError(
                    f"{type(optimizer).__name__} averages the weights itself, so ema_decay={decay} would average them "
                    f"twice. Remove ema_decay."
                )
        for parameter in parameters_of(self):
            for key in ("average", "num_averaged"):  # from an earlier run
                self.state.get(parameter, {}).pop(key, None)
        self._decay = decay

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # noqa: ANN401 - as in PyTorch
        """Take a step and update the average; return the closure's result."""
        loss = super().step(closure)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                if parameters := [p for p in group["params"] if p.grad is not None]:
                    self._update_averages(parameters, optimizer.state)
        return loss

    @torch.no_grad()
    def _update_averages(self, parameters: Sequence[Tensor], state: dict[Tensor, Any]) -> None:
        """Update the averages of parameters that have just been updated."""
        for parameter in parameters:
            if "average" not in state[parameter]:
                state[parameter]["average"] = parameter.clone()
                state[parameter]["num_averaged"] = torch.zeros((), device=parameter.device)
        averages = [local_shard(state[parameter]["average"]) for parameter in parameters]
        weights = [local_shard(parameter) for parameter in parameters]
        counts = [state[parameter]["num_averaged"] for parameter in parameters]
        is_applied = torch.ones_like(counts[0]) if self.found_inf is None else 1 - self.found_inf
        # A list of tensors, because PyTorch would read a single tensor's value on the host.
        torch._foreach_add_(counts, [is_applied] * len(counts))
        weight = is_applied * (_START_STEPS / (_START_STEPS + counts[0])).clamp(min=1 - self._decay)
        torch._foreach_lerp_(averages, weights, [weight.to(average.dtype) for average in averages])

    def train(self) -> None:
        """Do nothing. `OptimizerModes` restores the training weights after this call."""

    @torch.no_grad()
    def eval(self) -> None:
        """Replace the weights by their average."""
        for parameter in parameters_of(self):
            average = self.state.get(parameter, {}).get("average")
            if average is not None:
                parameter.copy_(average)
