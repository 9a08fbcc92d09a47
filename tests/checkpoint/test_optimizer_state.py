"""State of optimizers that is not tensors."""

from pathlib import Path

import numpy as np
import pytest
import torch

from homebrew.checkpoint.state_dict import (
    check_plain_optimizer_state,
    group_settings,
    plain_optimizer_state,
    restore_plain_optimizer_state,
)
from homebrew.errors import CorruptCheckpoint


def make(**group):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD([{"params": model.parameters(), "lr": 0.1, "momentum": 0.9, **group}])
    return model, optimizer, group_settings(optimizer)


def test_numbers_are_restored_and_settings_are_the_runs():
    model, optimizer, initial = make()
    optimizer.state[model.weight] |= {"step": 3, "odd": True, "moment": torch.zeros(1), "none": None}
    optimizer.param_groups[0] |= {"lr": 0.7, "distance": 0.1, "momentum": 0.8}
    state, unsupported = plain_optimizer_state(model, optimizer, initial)
    assert state == {
        "parameters": {"weight": {"step": 3, "odd": True}},
        "groups": [{"distance": 0.1, "momentum": 0.8}],
    }
    assert unsupported == []
    model, optimizer, _ = make(weight_decay=0.5)
    check_plain_optimizer_state(Path("state.json"), state, model, optimizer)
    restore_plain_optimizer_state(model, optimizer, state)
    assert optimizer.state[model.weight] == {"step": 3, "odd": True}
    group = optimizer.param_groups[0]
    assert [group[key] for key in ("lr", "distance", "momentum", "weight_decay")] == [0.1, 0.1, 0.8, 0.5]


def test_other_state_is_named_if_it_has_changed():
    model, optimizer, initial = make(betas=(0.9, 0.99), log=[1], array=np.ones(3), kind="a", none=None)
    assert plain_optimizer_state(model, optimizer, initial) == ({"parameters": {}, "groups": [{}]}, [])
    optimizer.param_groups[0] |= {"betas": (0.9, 0.98), "new": "word", "momentum": None}
    optimizer.param_groups[0]["log"].append(2)
    optimizer.param_groups[0]["array"] += 1
    optimizer.state[model.weight]["history"] = [1.0]
    state, unsupported = plain_optimizer_state(model, optimizer, initial)
    assert state["groups"] == [{}]
    assert unsupported == ["array", "betas", "history", "log", "momentum", "new"]


def test_a_tensor_in_a_group_is_named():
    assert plain_optimizer_state(*make(scale=torch.ones(2)))[1] == ["scale"]  # it may be changed in place


VALID = {"parameters": {}, "groups": [{}]}


@pytest.mark.parametrize(
    "state",
    [
        None,
        3,
        {},
        VALID | {"groups": []},
        VALID | {"groups": {}},
        VALID | {"groups": [3]},
        VALID | {"groups": [{"params": 3}]},
        VALID | {"groups": [{"lr": 3}]},
        VALID | {"groups": [{"betas": [0.9, 0.9]}]},
        VALID | {"parameters": [1]},
        VALID | {"parameters": {"weight": 1}},
        VALID | {"parameters": {"weight": {"step": "3"}}},
        VALID | {"parameters": {"other": {"step": 3}}},
    ],
)
def test_an_invalid_state_is_refused(state):
    model, optimizer, _ = make()
    with pytest.raises(CorruptCheckpoint, match=r"state\.json"):
        check_plain_optimizer_state(Path("state.json"), state, model, optimizer)
    check_plain_optimizer_state(Path("state.json"), VALID, model, optimizer)
