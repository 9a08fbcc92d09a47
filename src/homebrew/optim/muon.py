"""Muon: momentum whose update is orthogonalized, for the weight matrices of hidden layers (Jordan et al. 2024)."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from homebrew.distributed.fsdp import gather_like, local_shard, shard_like
from homebrew.errors import ConfigError

_MAX_BATCH_ELEMENTS = 2**25
"""Maximum number of elements that are orthogonalized together. Temporary tensors then take about 500 MB."""


class Muon(torch.optim.Muon):
    """PyTorch's Muon, which orthogonalizes matrices of the same shape together.

    The arguments and the state are PyTorch's. Differences: a batch of matrices takes the same number of kernel launches
    as one matrix; an update that is not finite is skipped on the device; matrices may be sharded by FSDP2; learning
    rates may be tensors on the device, which a CUDA graph needs; on a CPU the iteration runs in `cpu_dtype`.

    A parameter group may have `num_matrices`: the number of matrices of equal size that are stacked along dimension 0
    in each of its parameters, such as those of query, key and value. These matrices are orthogonalized separately.
    """

    cpu_dtype = torch.float32
    """Dtype of the iteration on a CPU. On a CPU with native bfloat16, bfloat16 takes half the time."""
    found_inf: Tensor | None = None
    """If set, a scalar on the device. While it is 1, steps change nothing, as in PyTorch's fused optimizers."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; see `torch.optim.Optimizer.add_param_group`.

        Raises:
            ConfigError: A parameter's rows cannot be divided into `num_matrices` matrices.
        """
        super().add_param_group(param_group)
        number = param_group.get("num_matrices", 1)
        for parameter in param_group["params"]:
            if number < 1 or len(parameter) % number:
                raise ConfigError(
                    f"num_matrices={number} does not divide the {len(parameter)} rows of a parameter. Use the number "
                    f"of matrices of equal size that it consists of."
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # noqa: ANN401 - as in PyTorch
        """Update the parameters that have a gradient; return the closure's result."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for parameters in _batches(group["params"]):
                self._update(parameters, group)
        return loss

    def _update(self, parameters: Sequence[Tensor], group: dict[str, Any]) -> None:
        """Update parameters of one shape (A, B)."""
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        buffers = [local_shard(self.state[parameter]["momentum_buffer"]) for parameter in parameters]
        gradients = [local_shard(parameter.grad) for parameter in parameters if parameter.grad is not None]
        gradient = torch.stack(gradients)  # (n, A, B); a shard has fewer rows
        old = torch.stack(buffers)
        new = old.lerp(gradient, 1 - group["momentum"])
        update = gradient.lerp_(new, group["momentum"]) if group["nesterov"] else new
        update = self._orthogonalize(update, parameters[0], group)
        learning_rate = group["lr"]
        decay = 1 - learning_rate * group["weight_decay"]
        if self.found_inf is not None:
            is_skipped = self.found_inf > 0
            new = torch.where(is_skipped, old, new)
            update = torch.where(is_skipped, 0.0, update)
            decay = torch.where(is_skipped, 1.0, decay)
        update = update.to(parameters[0].dtype) * (-learning_rate * _adjustment(group, parameters[0]))
        weights = [local_shard(parameter) for parameter in parameters]
        torch._foreach_copy_(buffers, new.unbind())
        torch._foreach_mul_(weights, decay)
        torch._foreach_add_(weights, update.unbind())

    def _orthogonalize(self, update: Tensor, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """Orthogonalize a batch of updates (n, A, B). Sharded updates are gathered first, and then sharded again."""
        settings = {key: group[key] for key in ("ns_coefficients", "ns_steps", "eps")}
        settings["dtype"] = self.cpu_dtype if update.device.type == "cpu" else torch.bfloat16
        is_sharded = hasattr(parameter, "device_mesh")
        full = torch.stack([gather_like(shard, parameter) for shard in update]) if is_sharded else update
        rows, columns = parameter.shape
        matrices = full.reshape(-1, rows // group.get("num_matrices", 1), columns)
        result = orthogonalize(matrices, **settings).reshape(full.shape)
        return torch.stack([local_shard(shard_like(x, parameter)) for x in result]) if is_sharded else result


def orthogonalize(
    x: Tensor, *, ns_coefficients: tuple[float, float, float], ns_steps: int, eps: float, dtype: torch.dtype
) -> Tensor:
    """Replace the singular values of matrices by about 1, with the Newton-Schulz iteration of Jordan et al. (2024).

    The iteration only multiplies matrices, and converges in five steps to singular values between 0.7 and 1.2, which
    is enough for an update.

    Args:
        x: Matrices, (n, A, B), any float dtype.
        ns_coefficients: Coefficients of the polynomial a·x + b·x³ + c·x⁵.
        ns_steps: Number of iterations.
        eps: Smallest norm to divide by.
        dtype: Dtype of the iteration; bfloat16 is exact enough.

    Returns:
        The matrices, (n, A, B), in that dtype.
    """
    a, b, c = ns_coefficients
    is_tall = x.shape[-2] > x.shape[-1]
    norm = torch.linalg.matrix_norm(x, keepdim=True).clamp(min=eps)  # Frobenius, at least the largest singular value
    x = (x / norm).to(dtype)
    x = x.mT if is_tall else x
    for _ in range(ns_steps):
        gram = x @ x.mT  # (n, A, A), the smaller side
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if is_tall else x


def _batches(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield parameters with a gradient in lists of equal shape, of at most `_MAX_BATCH_ELEMENTS` elements."""
    by_shape = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            by_shape[parameter.shape, parameter.dtype, parameter.device].append(parameter)
    for (shape, _, _), alike in by_shape.items():
        size = max(1, _MAX_BATCH_ELEMENTS // shape.numel())
        yield from (alike[start : start + size] for start in range(0, len(alike), size))


def _adjustment(group: dict[str, Any], parameter: Tensor) -> float:
    """Return the multiplier of the learning rate for a parameter's shape; see `torch.optim.Muon`."""
    rows, columns = parameter.shape[0] // group.get("num_matrices", 1), parameter.shape[1]
    if group["adjust_lr_fn"] == "match_rms_adamw":  # the size of AdamW's typical update (Liu et al. 2025)
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))
