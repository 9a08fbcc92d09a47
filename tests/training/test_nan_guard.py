import math

import pytest
import torch

from homebrew import Muon
from homebrew.errors import NonFiniteError
from homebrew.metrics.step_metrics import SkippedStep
from homebrew.optim.combined import combine, members
from homebrew.training.nan_guard import NanGuard

NUM_WARMUP = 50
"""A spike is recognized from the 51st accepted step on."""


def adamw(*parameters, fused=True):
    return torch.optim.AdamW(parameters, lr=0.1, fused=fused)


class SignedMuon(Muon):
    """Updates weights itself, without regard to `found_inf`."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(parameter.grad.sign(), alpha=-group["lr"])


FUSED = {
    "AdamW": adamw,
    "Muon": lambda matrix, vector: combine([Muon([matrix], lr=0.1), adamw(vector)]),
    "two of AdamW": lambda matrix, vector: combine([adamw(matrix), adamw(vector)]),
}
"""Functions from a matrix and a vector to an optimizer that skips steps on the device."""
NOT_FUSED = {
    "not fused AdamW": lambda *parameters: adamw(*parameters, fused=False),
    "Muon and not fused AdamW": lambda matrix, vector: combine([Muon([matrix], lr=0.1), adamw(vector, fused=False)]),
    "subclass of Muon": lambda matrix, vector: combine([SignedMuon([matrix], lr=0.1), adamw(vector)]),
    "SGD and AdamW": lambda matrix, vector: combine([torch.optim.SGD([matrix], lr=0.1, momentum=0.9), adamw(vector)]),
}
OPTIMIZERS = FUSED | NOT_FUSED


class GuardedRun:
    """Steps of two parameters under a guard."""

    def __init__(self, policy, *, optimizer="AdamW", limit=2, zscore=None):
        self.parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in ((3, 2), (2,))]
        self.optimizer = OPTIMIZERS[optimizer](*self.parameters)
        self.guard = NanGuard(self.optimizer, policy, limit, torch.device("cpu"), spike_zscore=zscore)
        self.num_steps = 0

    def step(self, loss=1.0, grad_norm=1.0):
        """Take a step; return the guard's review: the skipped step and the error that ends the run, or None each."""
        for parameter in self.parameters:
            parameter.grad = torch.full_like(parameter, grad_norm)
        result = self.guard.check(torch.tensor(loss), torch.tensor(grad_norm))
        if self.guard.allows_update(result):
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.num_steps += 1
        return self.guard.handle(self.num_steps - 1, result.tolist())

    def state(self):
        states = [self.optimizer.state.get(parameter, {}) for parameter in self.parameters]
        tensors = [*self.parameters, *(state[key] for state in states for key in sorted(state))]
        return [tensor.detach().clone() for tensor in tensors]

    def changes(self, **step):
        """Return whether a step changes the weight or the optimizer's state."""
        before = self.state()
        self.step(**step)
        return not all(torch.equal(a, b) for a, b in zip(before, self.state(), strict=True))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_non_finite_step_changes_no_weight_and_no_optimizer_state(optimizer):
    run = GuardedRun("skip", optimizer=optimizer)
    run.step()
    assert not run.changes(loss=math.nan)


@pytest.mark.parametrize("policy", ["raise", "skip"])
@pytest.mark.parametrize(
    ("loss", "grad_norm"), [(math.nan, 1.0), (1.0, math.nan), (math.inf, 1.0), (1.0, math.inf), (-math.inf, math.nan)]
)
def test_every_value_that_is_not_finite_skips_the_step(policy, loss, grad_norm):
    run = GuardedRun(policy)
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


def test_a_step_without_loss_and_gradient_is_a_warning_once():
    run = GuardedRun("raise")
    run.step(loss=0.0)
    run.step(grad_norm=0.0)
    with pytest.warns(UserWarning, match="step 2 are 0"):
        run.step(loss=0.0, grad_norm=0.0)
    run.step(loss=0.0, grad_norm=0.0)


@pytest.mark.parametrize("policy", ["raise", "skip"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_loss_spike_is_skipped_and_does_not_enter_the_running_mean(policy, optimizer):
    run = GuardedRun(policy, optimizer=optimizer, zscore=5.0)
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


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_host_never_decides_on_an_update_of_a_fused_optimizer(optimizer):
    """Reading the decision would wait for the device; the kernel reads it there."""
    bad = torch.tensor(math.nan)
    run = GuardedRun("skip", optimizer=optimizer)
    assert run.guard.allows_update(run.guard.check(bad, bad)) is (optimizer in FUSED)
    expected = 1.0 if optimizer in FUSED else None
    assert [getattr(member, "found_inf", None) for member in members(run.optimizer)] == (
        [expected] * len(members(run.optimizer))
    )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_skipped_first_step_has_no_effect(optimizer):
    run, new = (GuardedRun("skip", optimizer=optimizer) for _ in range(2))
    weights = run.state()
    run.step(loss=math.nan, grad_norm=math.nan)
    assert all(map(torch.equal, weights, run.state()))
    for each in (run, new):
        each.step()
        each.step(grad_norm=2.0)
    assert all(map(torch.equal, new.state(), run.state()))


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
