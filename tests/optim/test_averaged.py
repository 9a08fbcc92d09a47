import pytest
import torch

from homebrew import Muon
from homebrew.optim.averaged import AveragedOptimizer


def build(decay=0.75):
    parameters = [torch.nn.Parameter(torch.ones(4, 6)), torch.nn.Parameter(torch.ones(6))]
    optimizers = [Muon(parameters[:1], lr=0.1), torch.optim.AdamW(parameters[1:], lr=0.1, fused=True)]
    return parameters, AveragedOptimizer(optimizers, decay)


def step(parameters, optimizer, value=1.0):
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, value)
    optimizer.step()


def test_the_average_starts_at_the_first_weights_and_decays():
    parameters, optimizer = build()
    step(parameters, optimizer)
    expected = [parameter.clone() for parameter in parameters]
    for t in range(2, 50):
        step(parameters, optimizer)
        weight = max(0.25, 9 / (9 + t))
        expected = [average.lerp(new, weight) for average, new in zip(expected, parameters, strict=True)]
    optimizer.eval()
    for parameter, average in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter, average)


@pytest.mark.parametrize("is_skipped", [0.0, 1.0])
def test_a_skipped_step_does_not_move_the_average(is_skipped):
    parameters, optimizer = build()
    step(parameters, optimizer)
    step(parameters, optimizer)
    before = optimizer.state[parameters[0]]["average"].clone()
    for member in (optimizer, *optimizer.optimizers):
        member.found_inf = torch.tensor(is_skipped)
    step(parameters, optimizer)
    assert torch.equal(optimizer.state[parameters[0]]["average"], before) == bool(is_skipped)


def test_a_parameter_without_gradient_has_no_average_yet():
    """PyTorch's optimizers create their state if a parameter has none."""
    parameters, optimizer = build()
    parameters[0].grad = torch.ones(4, 6)
    optimizer.step()
    assert parameters[1] not in optimizer.state
    step(parameters, optimizer)
    assert torch.equal(optimizer.state[parameters[1]]["average"], parameters[1])


def test_weights_in_bfloat16_are_averaged():
    parameter = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = AveragedOptimizer([torch.optim.SGD([parameter], lr=1.0)], 0.5)
    optimizer.found_inf = torch.tensor(0.0)
    step([parameter], optimizer)
    step([parameter], optimizer)
    assert optimizer.state[parameter]["average"].tolist() == pytest.approx([-9 / 11] * 4, rel=1e-2)


def test_state_that_belongs_to_no_parameter_is_not_an_average():
    parameter = torch.nn.Parameter(torch.ones(4))
    member = torch.optim.SGD([parameter], lr=1.0)
    member.state["num_calls"] = 3
    optimizer = AveragedOptimizer([member], 0.5)
    optimizer.eval()
    step([parameter], optimizer)
    step([parameter], optimizer)
    optimizer.eval()
    assert parameter.tolist() == pytest.approx([-9 / 11] * 4)
