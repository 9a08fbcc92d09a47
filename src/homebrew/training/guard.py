"""The guard between a step's gradients and the weights: a bad number never passes."""

from typing import Literal

import torch
from torch import Tensor

from homebrew.errors import NonFiniteError

NonFinitePolicy = Literal["raise", "skip"]


class Guard:
    """Decides, on the device, whether a step's update is applied.

    The verdict is handed to the fused optimizer as `found_inf`, the way a gradient scaler does: the kernel then
    leaves weights, moments and step counts alone. The host learns of it when it next reads `report`, so that a
    good step costs no synchronisation.

    Args:
        optimizer: the one to hold back.
        policy: "raise": from the first bad step on nothing is applied, and `check` raises; "skip": bad steps
            alone are left out, up to `limit` of them in a row.
        limit: bad steps in a row that "skip" allows.
        device: where losses and gradients are.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, policy: NonFinitePolicy, limit: int, device: torch.device
    ) -> None:
        self.optimizer = optimizer
        self.policy = policy
        self.limit = limit
        self._on_device = bool(optimizer.defaults.get("fused"))
        zero = torch.zeros((), device=device)
        self._blocked = zero.clone()  # 1 where the coming update must not be applied
        self._in_a_row = zero.clone()
        self._longest = zero.clone()
        self._total = zero.clone()
        self._first_step = zero.clone() - 1

    def inspect(self, step: int, *numbers: Tensor) -> bool:
        """Look at a step's loss and gradient norm before its update.

        Args:
            step: counted from 0.
            numbers: float scalars, the same on every process.

        Returns:
            Whether to call the optimizer at all; always true where its kernel can hold itself back.
        """
        bad = 1.0 - torch.stack([number.detach().float() for number in numbers]).isfinite().all().float()
        if self.policy == "raise":
            bad = torch.maximum(bad, self._blocked)
        self._blocked.copy_(bad)
        self._in_a_row.add_(1.0).mul_(bad)
        self._longest.copy_(torch.maximum(self._longest, self._in_a_row))
        self._total.add_(bad)
        self._first_step.copy_(torch.where((self._first_step < 0) & (bad > 0), float(step), self._first_step))
        if self._on_device:
            self.optimizer.found_inf = self._blocked  # type: ignore[attr-defined]
            return True
        return not bool(bad)

    def check(self) -> int:
        """Read the verdicts so far; this waits for the device.

        Returns:
            Steps left out since the start.

        Raises:
            NonFiniteError: the policy is "raise" and a step was bad, or "skip" and too many were in a row.
        """
        longest, total, first = torch.stack([self._longest, self._total, self._first_step]).tolist()
        if self.policy == "raise" and total:
            raise NonFiniteError(
                f"The loss or the gradient norm of step {first:.0f} is not a finite number. No update was applied from "
                f"that step on. Lower the learning rate, look at the data, or set non_finite='skip'."
            )
        if longest > self.limit:
            raise NonFiniteError(
                f"{longest:.0f} steps in a row had a loss or gradient norm that is not a finite number; "
                f"non_finite_limit={self.limit} are allowed. Lower the learning rate, or look at the data."
            )
        return int(total)
