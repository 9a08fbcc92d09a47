import math

import pytest
import torch

from homebrew.errors import NonFiniteError
from homebrew.metrics.step_metrics import SkippedStep
from homebrew.training.nan_guard import NanGuard

NUM_WARMUP = 50
"""A spike is recognized from the 51st accepted step on."""


class GuardedRun:
    """Steps of one parameter under a guard."""

    def __init__(self, policy, *, fused=True, limit=2, zscore=None):
        self.weight = torch.nn.Parameter(torch.ones(3))
        self.optimizer = torch.optim.AdamW([self.weight], lr=0.1, fused=fused)
        self.guard = NanGuard(self.optimizer, policy, limit, torch.device("cpu"), spike_zscore=zscore)
        self.num_steps = 0

    def step(self, loss=1.0, grad_norm=1.0):
        """Take a step; return the guard's review: the skipped step and the error that ends the run, or None each."""
        self.weight.grad = torch.full_like(self.weight, grad_norm)
        result = self.guard.check(torch.tensor(loss), torch.tensor(grad_norm))
        if self.guard.allows_update(result):
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.num_steps += 1
        return self.guard.handle(self.num_steps - 1, result.tolist())

    def state(self):
        state = self.optimizer.state[self.weight]
        return [self.weight.detach().clone(), *(state[key].clone() for key in sorted(state))]

    def changes(self, **step):
        """Return whether a step changes the weight or the optimizer's state."""
        before = self.state()
        self.step(**step)
        return not all(torch.equal(a, b) for a, b in zip(before, self.state(), strict=True))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("policy", ["raise", "skip"])
@pytest.mark.parametrize(
    ("loss", "grad_norm"), [(math.nan, 1.0), (1.0, math.nan), (math.inf, 1.0), (1.0, math.inf), (-math.inf, math.nan)]
)
def test_a_non_finite_step_changes_no_weight_and_no_optimizer_state(policy, fused, loss, grad_norm):
    run = GuardedRun(policy, fused=fused)
    run.step()
    assert not run.changes(loss=loss, grad_norm=grad_norm)


def test_policy_raise_blocks_all_later_updates():
    run = GuardedRun("raise")
    assert run.step() == (None, None)
    skipped, error = run.step(loss=math.nan)
    assert (skipped.step, skipped.reason) == (1, "non_finite")
    assert isinstance(error, NonFiniteError)
    assert "step 1 " in str(error)
    assert not run.changes()


def test_policy_skip_continues_with_the_next_step():
    run = GuardedRun("skip")
    skipped, error = run.step(grad_norm=math.nan)
    assert (skipped.step, skipped.reason, error) == (0, "non_finite", None)
    assert run.changes()
    assert run.step() == (None, None)


def test_too_many_consecutive_skipped_steps_are_an_error():
    run = GuardedRun("skip", limit=2)
    for losses in ([math.nan, math.nan, 1.0], [math.nan, math.nan]):
        assert all(run.step(loss=loss)[1] is None for loss in losses)
    _, error = run.step(loss=math.nan)
    assert isinstance(error, NonFiniteError)
    assert "non_finite_limit=2" in str(error)


@pytest.mark.parametrize("policy", ["raise", "skip"])
@pytest.mark.parametrize("fused", [True, False])
def test_a_loss_spike_is_skipped_and_does_not_enter_the_running_mean(policy, fused):
    run = GuardedRun(policy, fused=fused, zscore=5.0)
    for step in range(NUM_WARMUP):
        assert run.step(loss=2.0 + 0.1 * (step % 2)) == (None, None)
    history = run.guard.state_dict()["history"]
    before = run.state()
    assert run.step(loss=4.0, grad_norm=2.0) == (SkippedStep(NUM_WARMUP, "loss_spike", 4.0, 2.0), None)
    assert all(torch.equal(a, b) for a, b in zip(before, run.state(), strict=True))
    assert torch.equal(history, run.guard.state_dict()["history"])
    assert run.changes(loss=2.0)


def test_state_dict_restores_the_spike_rule_and_the_number_of_consecutive_skips():
    run = GuardedRun("skip", zscore=5.0, limit=1)
    for step in range(NUM_WARMUP):
        run.step(loss=2.0 + 0.1 * (step % 2))
    run.step(loss=9.0)
    resumed = GuardedRun("skip", zscore=5.0, limit=1)
    resumed.guard.load_state_dict(run.guard.state_dict())
    skipped, error = resumed.step(loss=9.0)
    assert skipped.reason == "loss_spike"
    assert isinstance(error, NonFiniteError)  # the second in a row


def test_running_moments_are_those_of_the_losses():
    run = GuardedRun("skip", zscore=100.0)
    losses = torch.randn(40, generator=torch.Generator().manual_seed(0)) + 3.0
    for loss in losses.tolist():
        run.step(loss=loss)
    mean, variance, count = run.guard.state_dict()["history"].tolist()
    assert count == 40
    assert mean == pytest.approx(losses.mean().item(), rel=1e-5)
    assert variance == pytest.approx(losses.var(correction=0).item(), rel=1e-4)


def test_old_losses_are_forgotten_after_about_fifty_steps():
    run = GuardedRun("skip", zscore=100.0)
    losses = [3.0] * 50 + [2.0] * 50
    for loss in losses:
        run.step(loss=loss)
    mean, _, count = run.guard.state_dict()["history"].tolist()
    assert count == 100
    assert mean == pytest.approx(2.0 + 0.98**50, rel=1e-5)


def test_the_host_never_decides_on_an_update_of_a_fused_optimizer():
    """Reading the decision would wait for the device; the kernel reads it there."""
    bad = torch.tensor(math.nan)
    for fused in (True, False):
        run = GuardedRun("skip", fused=fused)
        assert run.guard.allows_update(run.guard.check(bad, bad)) is fused
        assert getattr(run.optimizer, "found_inf", None) == (1.0 if fused else None)


def test_reset_unblocks_updates_and_forgets_the_steps_before():
    run = GuardedRun("raise")
    run.step(loss=math.nan)
    run.guard.reset()
    assert run.step() == (None, None)
    assert run.changes()
    new = GuardedRun("skip", limit=1, zscore=3.0)
    used = GuardedRun("skip", limit=1, zscore=3.0)
    used.step(loss=2.0)
    used.step(loss=math.nan)
    used.guard.reset()
    assert all(map(torch.equal, used.guard.state_dict().values(), new.guard.state_dict().values()))
    assert used.step(loss=math.nan)[1] is None


def test_a_loss_at_the_limit_is_no_spike():
    run = GuardedRun("skip", zscore=1.0)
    for _ in range(NUM_WARMUP):
        run.step(loss=0.0)
    assert run.step(loss=1e-6) == (None, None)  # the smallest standard deviation that is assumed
    run = GuardedRun("skip", zscore=1.0)
    for _ in range(NUM_WARMUP):
        run.step(loss=0.0)
    skipped, _ = run.step(loss=1.1e-6)
    assert skipped.reason == "loss_spike"


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_all_state_is_on_the_given_device(policy):
    device = torch.device("meta")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(3, device=device))])
    guard = NanGuard(optimizer, policy, 1, device, spike_zscore=3.0)
    loss = torch.ones((), device=device)
    assert guard.check(loss, loss).device == device
    assert guard.state_dict()["history"].device == device


def test_a_gradient_scaler_does_not_call_fused_sgd_with_an_infinite_gradient():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, fused=True)
    NanGuard(optimizer, "skip", 1, torch.device("cpu"))
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale((weight * math.inf).sum()).backward()
    scaler.step(optimizer)
    assert torch.equal(weight.detach(), torch.ones(3))
    assert weight not in optimizer.state, "its momentum would start from uninitialized memory"
