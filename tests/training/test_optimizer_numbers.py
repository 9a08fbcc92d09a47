from pathlib import Path

import pytest
import torch

from homebrew.errors import CorruptCheckpoint
from homebrew.training.optimizer_numbers import OptimizerNumbers


def make():
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return model, optimizer, OptimizerNumbers(model, optimizer)


def test_numbers_come_back_and_settings_stay_the_runs_own():
    model, optimizer, numbers = make()
    optimizer.state[model.weight] |= {"step": 3, "odd": True, "moment": torch.zeros(1), "none": None}
    optimizer.param_groups[0] |= {"lr": 0.7, "distance": 0.1, "momentum": 0.8}
    state, lost = numbers.state()
    assert state == {
        "parameters": {"weight": {"step": 3, "odd": True}},
        "groups": [{"distance": 0.1, "momentum": 0.8}],
    }
    assert lost == []
    other, fresh, numbers = make()
    fresh.param_groups[0]["weight_decay"] = 0.5
    numbers.check(state, Path("state.json"))
    numbers.restore(state)
    assert fresh.state[other.weight] == {"step": 3, "odd": True}
    group = fresh.param_groups[0]
    assert [group[key] for key in ("lr", "distance", "momentum", "weight_decay")] == [0.1, 0.1, 0.8, 0.5]


GOOD = {"parameters": {}, "groups": [{}]}


@pytest.mark.parametrize(
    "state",
    [
        None,
        3,
        {},
        GOOD | {"groups": []},
        GOOD | {"groups": {}},
        GOOD | {"groups": [3]},
        GOOD | {"groups": [{"params": 3}]},
        GOOD | {"groups": [{"lr": 3}]},
        GOOD | {"groups": [{"betas": [0.9, 0.9]}]},
        GOOD | {"parameters": [1]},
        GOOD | {"parameters": {"weight": 1}},
        GOOD | {"parameters": {"weight": {"step": "3"}}},
        GOOD | {"parameters": {"other": {"step": 3}}},
    ],
)
def test_what_are_no_numbers_of_this_optimizer_is_refused(state):
    with pytest.raises(CorruptCheckpoint, match=r"state\.json"):
        make()[2].check(state, Path("state.json"))
    make()[2].check(GOOD, Path("state.json"))
