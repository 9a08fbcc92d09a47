from contextlib import nullcontext

import pytest
import torch

from homebrew.training.learning_rates import LearningRates, warn_of_tiny_multipliers


def build(in_tensor=True):
    """Return an optimizer of two groups, whose first learning rate may be in a tensor."""
    first, second = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1))
    groups = [{"params": [first], "lr": torch.tensor(2.0) if in_tensor else 2.0}, {"params": [second], "lr": 4.0}]
    return torch.optim.SGD(groups, foreach=False)


def rates(optimizer):
    return [float(group["lr"]) for group in optimizer.param_groups]


@pytest.mark.parametrize("in_tensor", [False, True])
def test_learning_rates_are_multiples_of_their_peaks_until_they_are_restored(in_tensor):
    optimizer = build(in_tensor)
    first = optimizer.param_groups[0]["lr"]
    learning_rates = LearningRates(optimizer, lambda step: 1 / (step + 1))
    for step, expected in ((0, [2.0, 4.0]), (3, [0.5, 1.0])):
        assert learning_rates.set(step) == expected[0]
        assert rates(optimizer) == expected
    learning_rates.restore()
    assert rates(optimizer) == [2.0, 4.0]
    assert not in_tensor or optimizer.param_groups[0]["lr"] is first
    optimizer.param_groups[1]["lr"] = 8.0
    learning_rates.start()
    learning_rates.set(1)
    assert rates(optimizer) == [1.0, 4.0]


def test_a_changed_learning_rate_is_replaced_with_a_warning():
    optimizer = build()
    learning_rates = LearningRates(optimizer, lambda step: 0.5)
    learning_rates.set(0)
    optimizer.param_groups[1]["lr"] = 7.0
    with pytest.warns(UserWarning, match="schedule sets before every step"):
        learning_rates.set(1)
    assert rates(optimizer) == [1.0, 2.0]


@pytest.mark.parametrize("num_groups", [1, 2, 3])
def test_groups_without_a_peak_are_left_alone(num_groups):
    """`TrainStep` then names what is wrong if the number of groups has changed."""
    optimizer = build()
    learning_rates = LearningRates(optimizer, lambda step: 0.5)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "lr": 7.0})
    del optimizer.param_groups[num_groups:]
    learning_rates.set(0)
    assert rates(optimizer) == [1.0, 2.0, 7.0][:num_groups]


@pytest.mark.parametrize(
    ("peak", "multiplier", "warns"),
    [(6e-4, 6e-4, True), (6e-4, 0.0, True), (1.0, 6e-4, False), (6e-4, 1.0, False), (1e-6, 1.0, False)],
)
def test_a_schedule_that_returns_no_multiplier_causes_a_warning(peak, multiplier, warns):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=peak)
    with pytest.warns(UserWarning, match="not the learning rate itself") if warns else nullcontext():
        warn_of_tiny_multipliers(optimizer, lambda step: multiplier if step > 50 else 0.0, 1_000)
