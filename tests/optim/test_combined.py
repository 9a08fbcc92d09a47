import copy

import pytest
import torch

from homebrew import Muon
from homebrew.errors import ConfigError
from homebrew.optim.combined import CombinedOptimizer, combine, members


def matrix_and_vector():
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((4, 6), (6,))]


def build(parameters):
    matrix, vector = parameters
    return [Muon([matrix], lr=0.1), torch.optim.AdamW([vector], lr=0.01, betas=(0.5, 0.6))]


def train(optimizers, parameters, steps):
    for step in range(steps):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter).cumsum(0) * (step + 1)
        for optimizer in optimizers:
            optimizer.step()


def test_a_combined_optimizer_does_what_its_members_do():
    together, separate = matrix_and_vector(), matrix_and_vector()
    combined = CombinedOptimizer(build(together))
    train([combined], together, 3)
    train(build(separate), separate, 3)
    assert all(map(torch.equal, together, separate))
    combined.zero_grad()
    assert all(parameter.grad is None for parameter in together)


def test_groups_and_state_are_shared():
    parameters = matrix_and_vector()
    optimizers = build(parameters)
    combined = combine(optimizers)
    assert members(combined) == optimizers
    assert combined.param_groups == [group for optimizer in optimizers for group in optimizer.param_groups]
    combined.param_groups[0]["lr"] = 0.0
    before = parameters[0].clone()
    train([combined], parameters, 1)
    assert torch.equal(parameters[0], before)
    assert combined.state.keys() == set(parameters)


def test_a_group_that_no_optimizer_would_train_is_refused():
    parameters = matrix_and_vector()
    optimizers = build(parameters)
    combined = combine(optimizers)
    new = torch.nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ConfigError, match="one of the optimizers"):
        combined.add_param_group({"params": [new]})
    optimizers[0].add_param_group({"params": [new]})
    assert combined.param_groups[1]["params"] == [new]


def test_state_that_exists_before_is_kept():
    parameters = matrix_and_vector()
    combined = combine([Muon(parameters[:1]), torch.optim.Adagrad(parameters[1:])])  # Adagrad has state at once
    assert parameters[1] in combined.state
    train([combined], parameters, 1)


def test_a_loaded_state_continues_exactly():
    parameters = matrix_and_vector()
    uninterrupted = combine(build(parameters))
    train([uninterrupted], parameters, 2)
    others = copy.deepcopy(parameters)
    resumed = combine(build(others))
    resumed.load_state_dict(copy.deepcopy(uninterrupted.state_dict()))
    train([uninterrupted], parameters, 2)
    train([resumed], others, 2)
    assert all(map(torch.equal, parameters, others))


def test_a_parameter_in_two_optimizers_is_an_error():
    parameters = matrix_and_vector()
    with pytest.raises(ConfigError, match="Give each parameter to one optimizer"):
        combine([Muon(parameters[:1]), torch.optim.AdamW(parameters)])


def test_one_optimizer_stays_itself():
    optimizer = torch.optim.AdamW(matrix_and_vector())
    assert combine([optimizer]) is optimizer
    assert members(optimizer) == [optimizer]


def test_an_optimizer_stays_usable_on_its_own():
    parameters = matrix_and_vector()
    optimizers = build(parameters)
    combined = combine(optimizers)
    train([combined], parameters, 2)
    for optimizer, parameter in zip(optimizers, parameters, strict=True):
        assert optimizer.state.keys() == {parameter}
        state = copy.deepcopy(optimizer.state_dict())
        optimizer.load_state_dict(state)
        assert state["state"][0].keys() == combined.state[parameter].keys()
        assert all(combined.state[parameter][key] is value for key, value in optimizer.state[parameter].items())
    assert combined.param_groups == [group for optimizer in optimizers for group in optimizer.param_groups]
    combined.param_groups[0]["lr"] = 0.0
    before = parameters[0].clone()
    train([combined], parameters, 1)
    assert torch.equal(parameters[0], before)


def test_each_optimizer_loads_its_own_state():
    """A subclass may do more than PyTorch's method, and state may belong to no parameter."""

    class Counting(torch.optim.SGD):
        def load_state_dict(self, state_dict):
            super().load_state_dict(state_dict)
            self.num_loads = 1

    parameters = matrix_and_vector()
    counting = Counting(parameters[1:])
    counting.state["calls"] = 3
    combined = combine([Muon(parameters[:1]), counting])
    train([combined], parameters, 1)
    combined.load_state_dict(combined.state_dict())
    assert counting.num_loads == 1
    assert counting.state["calls"] == 3
    with pytest.raises(ValueError, match="parameter group"):
        combined.load_state_dict({"state": {}, "param_groups": combined.state_dict()["param_groups"][:1]})


def test_state_under_the_same_key_stays_that_of_each_optimizer():
    optimizers = [torch.optim.SGD([parameter]) for parameter in matrix_and_vector()]
    for calls, optimizer in enumerate(optimizers):
        optimizer.state["calls"] = torch.tensor(calls)
    combined = combine(optimizers)
    combined.load_state_dict(combined.state_dict())
    assert [optimizer.state["calls"].item() for optimizer in optimizers] == [0, 1]


def test_reading_the_state_creates_none():
    parameters = matrix_and_vector()
    optimizers = build(parameters)
    combined = combine(optimizers)
    assert combined.state.get(parameters[0], {}) == {}
    assert parameters[1] not in combined.state
    with pytest.raises(KeyError):
        combined.state[parameters[1]]
    assert all(len(optimizer.state) == 0 for optimizer in optimizers)
    combined.state[parameters[1]] = {"average": 1.0}
    assert dict(combined.state) == optimizers[1].state == {parameters[1]: {"average": 1.0}}
    assert combined.state.pop(parameters[1]) == {"average": 1.0}
    assert len(combined.state) == 0
