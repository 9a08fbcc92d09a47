import pytest
import torch

from homebrew.errors import NonFiniteError
from homebrew.training.guard import Guard

NAN, INF = float("nan"), float("inf")
CPU = torch.device("cpu")


def make(policy, *, fused=True, limit=2):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=fused)
    return weight, optimizer, Guard(optimizer, policy, limit, CPU)


def take(weight, optimizer, guard, step, loss=1.0, norm=1.0):
    weight.grad = torch.full_like(weight, norm)
    if guard.inspect(step, torch.tensor(loss), torch.tensor(norm)):
        optimizer.step()
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


def test_raise_holds_everything_back_from_the_first_bad_step_on():
    weight, optimizer, guard = make("raise")
    take(weight, optimizer, guard, 0)
    assert guard.check() == 0
    take(weight, optimizer, guard, 1, loss=NAN)
    before = snapshot(weight, optimizer)
    take(weight, optimizer, guard, 2)
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(weight, optimizer), strict=True))
    with pytest.raises(NonFiniteError, match="step 1 "):
        guard.check()


def test_skip_counts_and_goes_on():
    weight, optimizer, guard = make("skip")
    take(weight, optimizer, guard, 0, loss=NAN)
    take(weight, optimizer, guard, 1)
    assert guard.check() == 1
    assert not torch.equal(weight, torch.ones(3))


def test_skip_has_a_limit_in_a_row_even_if_a_good_step_follows():
    weight, optimizer, guard = make("skip", limit=2)
    for step in range(2):
        take(weight, optimizer, guard, step, loss=NAN)
    assert guard.check() == 2
    take(weight, optimizer, guard, 2, loss=NAN)
    take(weight, optimizer, guard, 3)
    with pytest.raises(NonFiniteError, match="3 steps in a row"):
        guard.check()
