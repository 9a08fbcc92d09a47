import pytest
import torch

from homebrew.errors import NonFiniteError
from homebrew.training.nan_guard import SPIKE_WARMUP, NanGuard

NAN, INF = float("nan"), float("inf")
CPU = torch.device("cpu")


def make(policy, *, fused=True, limit=2, zscore=None):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=fused)
    return weight, optimizer, NanGuard(optimizer, policy, limit, CPU, spike_zscore=zscore)


def take(weight, optimizer, guard, step, loss=1.0, norm=1.0):
    weight.grad = torch.full_like(weight, norm)
    verdict = guard.judge(torch.tensor(loss), torch.tensor(norm))
    if guard.lets_pass(verdict):
        optimizer.step()
    guard.record(step, verdict)
    optimizer.zero_grad()


def snapshot(weight, optimizer):
    return [weight.detach().clone(), *(value.clone() for value in optimizer.state[weight].values())]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("policy", ["raise", "skip"])
@pytest.mark.parametrize(("loss", "norm"), [(NAN, 1.0), (1.0, NAN), (INF, 1.0), (1.0, INF), (-INF, NAN)])
def test_a_bad_step_changes_no_bit_of_weights_or_optimizer(policy, fused, loss, norm):
    weight, optimizer, guard = make(policy, fused=fused)
    take(weight, optimizer, guard, 0)
    before = snapshot(weight, optimizer)
    take(weight, optimizer, guard, 1, loss, norm)
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(weight, optimizer), strict=True))


def enforce(guard):
    guard.send()
    found = guard.check()
    guard.enforce()
    return [(held.step, held.reason) for held in found]


def test_raise_holds_everything_back_from_the_first_bad_step_on():
    weight, optimizer, guard = make("raise")
    take(weight, optimizer, guard, 0)
    assert enforce(guard) == []
    take(weight, optimizer, guard, 1, loss=NAN)
    before = snapshot(weight, optimizer)
    take(weight, optimizer, guard, 2)
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(weight, optimizer), strict=True))
    with pytest.raises(NonFiniteError, match="step 1 "):
        enforce(guard)


def test_skip_counts_and_goes_on():
    weight, optimizer, guard = make("skip")
    take(weight, optimizer, guard, 0, loss=NAN)
    take(weight, optimizer, guard, 1)
    assert enforce(guard) == [(0, "non_finite")]
    assert not torch.equal(weight, torch.ones(3))


def test_skip_has_a_limit_in_a_row_even_if_a_good_step_follows():
    weight, optimizer, guard = make("skip", limit=2)
    for step in range(2):
        take(weight, optimizer, guard, step, loss=NAN)
    assert len(enforce(guard)) == 2
    take(weight, optimizer, guard, 2, loss=NAN)
    take(weight, optimizer, guard, 3)
    with pytest.raises(NonFiniteError, match="3 steps in a row"):
        enforce(guard)


@pytest.mark.parametrize("policy", ["raise", "skip"])
@pytest.mark.parametrize("fused", [True, False])
def test_a_loss_spike_is_left_out_and_does_not_move_the_mean(policy, fused):
    weight, optimizer, guard = make(policy, fused=fused, zscore=5.0)
    for step in range(SPIKE_WARMUP + 10):
        take(weight, optimizer, guard, step, loss=2.0 + 0.1 * (step % 2))
    assert enforce(guard) == []
    before, history = snapshot(weight, optimizer), guard.state_dict()["history"].clone()
    take(weight, optimizer, guard, 100, loss=4.0)
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(weight, optimizer), strict=True))
    assert torch.equal(history, guard.state_dict()["history"])
    take(weight, optimizer, guard, 101, loss=2.0)
    assert enforce(guard) == [(100, "loss_spike")]
    assert not torch.equal(before[0], weight)


def test_the_spike_rule_goes_on_from_its_state():
    weight, optimizer, guard = make("skip", zscore=5.0)
    for step in range(SPIKE_WARMUP):
        take(weight, optimizer, guard, step, loss=2.0 + 0.1 * (step % 2))
    enforce(guard)
    _, _, other = make("skip", zscore=5.0)
    other.load_state_dict(guard.state_dict())
    for step, loss in enumerate((2.1, 9.0)):
        other.record(step, other.judge(torch.tensor(loss), torch.tensor(1.0)))
    assert enforce(other) == [(1, "loss_spike")]


def test_the_running_moments_are_those_of_the_losses():
    weight, optimizer, guard = make("skip", zscore=100.0)
    losses = torch.randn(40, generator=torch.Generator().manual_seed(0)) + 3.0
    for step, loss in enumerate(losses.tolist()):
        take(weight, optimizer, guard, step, loss=loss)
    mean, variance, number = guard.state_dict()["history"].tolist()
    assert number == 40
    assert mean == pytest.approx(losses.mean().item(), rel=1e-5)
    assert variance == pytest.approx(losses.var(correction=0).item(), rel=1e-4)


def test_what_it_remembers_stays_where_it_is():
    """A CUDA graph that has the guard in it reads and writes there."""
    _, _, guard = make("raise", zscore=5.0)
    places = guard._blocked.data_ptr(), guard._history.data_ptr()
    guard.judge(torch.tensor(2.0), torch.tensor(1.0))
    guard.load_state_dict(guard.state_dict())
    guard.reset()
    assert (guard._blocked.data_ptr(), guard._history.data_ptr()) == places
