from pathlib import Path

import numpy as np
import pytest
import torch

from homebrew.checkpoint.optimizer_numbers import OptimizerNumbers
from homebrew.errors import CorruptCheckpoint


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


def test_what_a_group_had_from_the_start_and_no_checkpoint_holds_is_named_once_changed():
    model = torch.nn.Linear(2, 2)
    group = {"lr": torch.tensor(0.1), "betas": (0.9, 0.99), "log": [1], "many": np.ones(3), "kind": "a", "d": None}
    optimizer = torch.optim.SGD([{"params": model.parameters(), **group}])
    numbers = OptimizerNumbers(model, optimizer)
    assert numbers.state() == ({"parameters": {}, "groups": [{}]}, [])
    optimizer.param_groups[0] |= {"betas": (0.9, 0.98), "new": "word", "momentum": None}
    optimizer.param_groups[0]["log"].append(2)
    optimizer.param_groups[0]["many"] += 1
    state, lost = numbers.state()
    assert state["groups"] == [{}]
    assert sorted(lost) == ["betas", "log", "many", "momentum", "new"]


def test_a_groups_tensor_is_named_for_it_may_change_in_place():
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD([{"params": model.parameters(), "lr": 0.1, "scale": torch.ones(2)}])
    assert OptimizerNumbers(model, optimizer).state()[1] == ["scale"]


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
