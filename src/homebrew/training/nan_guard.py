"""The guard between a step's gradients and the weights: a bad number never passes."""

from collections.abc import Mapping

import torch
from torch import Tensor

from homebrew.errors import NonFiniteError
from homebrew.metrics.step_metrics import SkippedStep
from homebrew.training.trainer_config import NonFinitePolicy

SPIKE_MEMORY = 0.98
"""Weight of the past in the running mean and variance of the loss: about the last fifty steps."""
SPIKE_WARMUP = 50
"""Accepted steps before a loss can be a spike."""


class NanGuard:
    """Decides, on the device, whether a step's update is applied.

    The verdict is handed to the fused optimizer as `found_inf`, the way a gradient scaler does: the kernel then
    leaves weights, moments and step counts alone. The host learns of it by `send` and `check`, between which it may
    set the device to the next step, so that it waits for none.

    Args:
        optimizer: the one to hold back.
        policy: what to do with numbers that are not finite. "raise": from the first such step on nothing is
            applied, and `enforce` raises; "skip": such steps alone are left out.
        limit: steps in a row that may be left out.
        device: where losses and gradients are.
        spike_zscore: leave out a step whose loss lies more than so many standard deviations above the mean of
            the accepted steps before it; None leaves out none.
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
        self._on_device = bool(optimizer.defaults.get("fused"))
        self._blocked = torch.zeros((), device=device)  # 1 where the coming update must not be applied
        self._history = torch.zeros(3, device=device)  # of accepted losses: mean, variance, number
        self._recorded: list[tuple[int, Tensor]] = []
        self._sent: list[tuple[int, Tensor]] = []
        self._arrived = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self.latest = float("nan"), float("nan")
        """Loss and gradient norm of the last step that `check` has read."""
        self._in_a_row = 0
        self._fatal: SkippedStep | None = None  # what ends the run

    def judge(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Look at a step's numbers before its update, once, and tell the optimizer; all of it happens on the device.

        What is remembered changes in place, for a CUDA graph may have this in it.

        Args:
            loss: float scalar, the same on every process.
            grad_norm: the same, before clipping.

        Returns:
            (4,), float32: whether a number is not finite, whether the update is held back, the loss, the norm.
        """
        numbers = torch.stack([loss.detach().float(), grad_norm.detach().float()])
        bad = (numbers - numbers).ne(0).any().float()  # x - x is 0, or NaN where x is not finite
        held_back = bad
        if self.policy == "raise":  # a bad number blocks every later step; a spike only its own
            held_back = torch.maximum(bad, self._blocked)
            self._blocked.copy_(held_back)
        if self.spike_zscore is not None:
            held_back = torch.maximum(held_back, self._is_spike(numbers[0], self.spike_zscore))
            self._remember(numbers[0], accepted=1.0 - held_back)
        if self._on_device:
            self.optimizer.found_inf = held_back  # type: ignore[attr-defined]
        return torch.cat([bad[None], held_back[None], numbers])

    def lets_pass(self, verdict: Tensor) -> bool:
        """Whether to call the optimizer at all; always true where its kernel can hold itself back."""
        return self._on_device or not bool(verdict[1])

    def record(self, step: int, verdict: Tensor) -> None:
        """Keep what `judge` said of a step, counted from 0, to be sent."""
        self._recorded.append((step, verdict))

    def send(self) -> None:
        """Let the verdicts recorded so far come to the host, which may do other work meanwhile; `check` reads them."""
        if self._recorded:
            steps, verdicts = zip(*self._recorded, strict=True)
            # From a CUDA device into pinned memory: the copy waits for the steps, and the host for neither.
            rows = torch.stack(verdicts).to("cpu", non_blocking=self._arrived is not None)
            self._sent += zip(steps, rows, strict=True)
            self._recorded = []
            if self._arrived is not None:
                self._arrived.record(torch.cuda.current_stream(self._blocked.device))

    def _is_spike(self, loss: Tensor, zscore: float) -> Tensor:
        mean, variance, number = self._history
        deviation = variance.sqrt().clamp(min=1e-6)
        spike: Tensor = (number >= SPIKE_WARMUP) & (loss - mean > zscore * deviation)
        return spike.float()

    def _remember(self, loss: Tensor, *, accepted: Tensor) -> None:
        """Running moments with a bias correction in the first steps (Welford's update, weighted)."""
        mean, variance, number = self._history
        weight = torch.clamp(1.0 / (number + 1.0), min=1.0 - SPIKE_MEMORY)
        off = loss - mean
        updated = torch.stack([mean + weight * off, (1.0 - weight) * (variance + weight * off * off), number + 1.0])
        self._history.copy_(torch.where(accepted > 0, updated, self._history))

    def check(self) -> list[SkippedStep]:
        """Read the verdicts that were sent, which waits for them; `enforce` says what follows.

        Returns:
            The steps held back among them, in order.
        """
        sent, self._sent = self._sent, []
        if sent and self._arrived is not None:
            self._arrived.synchronize()
        found = []
        for step, verdict in sent:
            not_finite, held_back, loss, grad_norm = verdict.tolist()
            self.latest = loss, grad_norm
            self._in_a_row = self._in_a_row + 1 if held_back else 0
            if held_back:
                found.append(SkippedStep(step, "non_finite" if not_finite else "loss_spike", loss, grad_norm))
            if self._in_a_row > self.limit or (not_finite and self.policy == "raise"):
                self._fatal, self._recorded = found[-1], []  # what follows was held back for this one
                break
        return found

    def enforce(self) -> None:
        """End the run if what `check` has found asks for it; so does every further call, till the next run begins.

        Raises:
            NonFiniteError: a number was not finite and the policy is "raise", or too many steps in a row were
                left out.
        """
        fatal = self._fatal
        if fatal is None:
            return
        if self.policy == "raise" and fatal.reason == "non_finite":
            raise NonFiniteError(
                f"The loss or the gradient norm of step {fatal.step} is not a finite number (loss {fatal.loss:g}, norm "
                f"{fatal.grad_norm:g}). No update was applied from that step on. Lower the learning rate, look at the "
                f"data, or set non_finite='skip'."
            )
        raise NonFiniteError(
            f"{self.limit + 1} steps in a row, the last being step {fatal.step}, had a loss or gradient norm that is "
            f"not finite or a loss spike; non_finite_limit={self.limit} are allowed. Lower the learning rate, or look "
            f"at the data."
        )

    def reset(self) -> None:
        """Forget everything: a run begins."""
        self._blocked.zero_()
        self._history.zero_()
        self._recorded, self._sent, self._in_a_row, self._fatal = [], [], 0, None

    def state_dict(self) -> dict[str, Tensor]:
        """What the spike rule remembers, for a checkpoint; call `send` and `check` first."""
        return {"history": self._history.clone(), "in_a_row": torch.tensor(self._in_a_row)}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Put `state` back."""
        self._history.copy_(state_dict["history"])
        self._in_a_row = int(state_dict["in_a_row"])
