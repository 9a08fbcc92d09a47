"""Skips updates whose loss or gradient is not finite, or whose loss spikes, without a host sync."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from homebrew.errors import NonFiniteError
from homebrew.metrics.step_metrics import SkippedStep
from homebrew.optim.combined import members
from homebrew.optim.muon import Muon
from homebrew.training.trainer_config import NonFinitePolicy
from homebrew.user_warnings import warn

SPIKE_MEMORY = 0.98
"""Decay of the running mean and variance of the loss: about the last fifty steps."""
SPIKE_WARMUP = 50
"""Number of accepted steps before a loss can count as a spike."""


class NanGuard:
    """Decides on the device whether a step's update is applied.

    The decision is passed to Muon and to PyTorch's fused Adam, AdamW and Adagrad as `found_inf`, as
    `torch.amp.GradScaler` does: they then leave weights, moments and step counts unchanged. The host reads the results
    later, in `handle`. Other optimizers are not called for a skipped step, for which the host waits for the device.

    Args:
        optimizer: Optimizer whose updates are guarded.
        policy: What to do when a loss or gradient norm is not finite. "raise": skip this and every later update, and
            end the run; "skip": skip this update only.
        limit: Maximum number of consecutive skipped steps.
        device: Device of the losses and gradients.
        spike_zscore: Skip a step whose loss is more than this many standard deviations above the running mean of the
            accepted steps. None disables the rule.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        policy: NonFinitePolicy,
        limit: int,
        device: torch.device,
        *,
        spike_zscore: float | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.policy = policy
        self.limit = limit
        self.spike_zscore = spike_zscore
        self._blocked = torch.zeros((), device=device)  # 1 after a non-finite step, if the policy is "raise"
        self._history = torch.zeros(3, device=device)  # accepted losses: mean, variance, count
        self._num_consecutive = 0
        self._has_warned = False  # of a step without targets
        if not self._is_fused:  # a GradScaler then skips steps itself, too
            optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]

    @property
    def _is_fused(self) -> bool:
        """Whether the optimizer skips an update itself, on the device."""
        return all(map(_skips_on_device, members(self.optimizer)))

    def check(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Decide on the device whether a step's update is applied, and pass the decision to a fused optimizer.

        State is updated in place, because a CUDA graph may contain this call.

        Args:
            loss: Float scalar, equal on every rank.
            grad_norm: Float scalar, equal on every rank, before clipping.

        Returns:
            The step's result, (4,), float32: is_non_finite, is_skipped, loss, gradient norm.
        """
        values = torch.stack([loss.detach().float(), grad_norm.detach().float()])
        non_finite = (values - values).ne(0).any().float()  # x - x is NaN where x is not finite, else 0
        skipped = non_finite
        if self.policy == "raise":  # a non-finite step blocks all later steps; a spike blocks one step
            skipped = torch.maximum(non_finite, self._blocked)
            self._blocked.copy_(skipped)
        if self.spike_zscore is not None:
            skipped = torch.maximum(skipped, self._is_spike(values[0], self.spike_zscore))
            self._update_history(values[0], accepted=1.0 - skipped)
        if self._is_fused:
            for optimizer in (self.optimizer, *members(self.optimizer)):
                optimizer.found_inf = skipped  # type: ignore[attr-defined]
        return torch.cat([non_finite[None], skipped[None], values])

    def allows_update(self, result: Tensor) -> bool:
        """Return whether to call the optimizer: always for a fused one, whose kernel skips the update itself."""
        return self._is_fused or not bool(result[1])

    def handle(self, step: int, result: Sequence[float]) -> tuple[SkippedStep | None, NonFiniteError | None]:
        """Handle a result on the host: count skipped steps, decide whether the run must end, and warn of no targets.

        Args:
            step: Number of the step, counted from 1 as in `StepMetrics.step`.
            result: The four numbers of `check`.

        Returns:
            The skipped step, or None; and the error that ends the run, or None.
        """
        non_finite, is_skipped, loss, grad_norm = result
        if loss == grad_norm == 0.0 and not self._has_warned:
            self._has_warned = True
            warn(
                f"The loss and the gradient of step {step} are 0, as if no token had to be predicted. Check the "
                f"targets or the loss_mask of the dataset."
            )
        if not is_skipped:
            self._num_consecutive = 0
            return None, None
        self._num_consecutive += 1
        skipped = SkippedStep(step, "non_finite" if non_finite else "loss_spike", loss, grad_norm)
        if non_finite and self.policy == "raise":
            return skipped, NonFiniteError(
                f"The loss or the gradient norm of step {step} is not finite (loss {loss:g}, norm {grad_norm:g}). The "
                f"updates of this and all later steps were skipped. Lower the learning rate, check the data, or set "
                f"non_finite='skip'."
            )
        if self._num_consecutive > self.limit:
            return skipped, NonFiniteError(
                f"The last {self._num_consecutive} steps, up to step {step}, had a non-finite loss or gradient norm or "
                f"a loss spike, which exceeds non_finite_limit={self.limit}. Lower the learning rate, or check the "
                f"data."
            )
        return skipped, None

    def reset(self) -> None:
        """Clear all state, at the start of a run."""
        self._blocked.zero_()
        self._history.zero_()
        self._num_consecutive = 0
        self._has_warned = False

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state for a checkpoint; every result must have been handled."""
        return {"history": self._history.clone(), "num_consecutive": torch.tensor(self._num_consecutive)}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned."""
        self._history.copy_(state_dict["history"])
        self._num_consecutive = int(state_dict["num_consecutive"])

    def _is_spike(self, loss: Tensor, zscore: float) -> Tensor:
        mean, variance, count = self._history
        deviation = variance.sqrt().clamp(min=1e-6)
        spike: Tensor = (count >= SPIKE_WARMUP) & (loss - mean > zscore * deviation)
        return spike.float()

    def _update_history(self, loss: Tensor, *, accepted: Tensor) -> None:
        """Update the running moments: Welford's algorithm, weighted, exact for the first steps."""
        mean, variance, count = self._history
        weight = torch.clamp(1.0 / (count + 1.0), min=1.0 - SPIKE_MEMORY)
        delta = loss - mean
        updated = torch.stack(
            [mean + weight * delta, (1.0 - weight) * (variance + weight * delta * delta), count + 1.0]
        )
        self._history.copy_(torch.where(accepted > 0, updated, self._history))


def _skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimizer skips a step if `found_inf` is 1.

    Not fused SGD: if the first step is skipped, its momentum starts from uninitialized memory. Not a subclass, whose
    step may update weights in another way.
    """
    if type(optimizer) is Muon:
        return True
    is_known = type(optimizer) in (torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad)
    return is_known and all(group.get("fused") for group in optimizer.param_groups)
