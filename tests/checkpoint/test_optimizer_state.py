"""The state of optimizers: tensors, plain numbers, and what is checked before a state is loaded."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from homebrew.checkpoint.optimizer_state import (
    check_optimizer_state,
    group_settings,
    initial_state,
    load_optimizer_state,
    optimizer_json,
    state_tensors,
)
from homebrew.errors import CorruptCheckpoint, ResumeMismatch
from homebrew.optim.averaged import AveragedOptimizer


def make(**group):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD([{"params": model.parameters(), "lr": 0.1, "momentum": 0.9, **group}])
    return model, optimizer, group_settings(optimizer)


def load(state, tensors, model, optimizer, initial=None):
    check_optimizer_state(Path("step"), state, tensors, model, optimizer)
    load_optimizer_state(Accelerator(cpu=True), model, optimizer, tensors, state, initial or {})


def test_numbers_are_restored_and_settings_are_the_runs():
    model, optimizer, initial = make()
    optimizer.state[model.weight] |= {"step": 3, "odd": True, "none": None}
    optimizer.param_groups[0] |= {"lr": 0.7, "distance": 0.1, "momentum": 0.8}
    state, unsaved = optimizer_json(model, optimizer, initial)
    assert state == {
        "tensors": {},
        "parameters": {"weight": {"step": 3, "odd": True, "none": None}},
        "groups": [{"distance": 0.1, "momentum": 0.8}],
    }
    assert unsaved == []
    model, optimizer, _ = make(weight_decay=0.5)
    load(state, {}, model, optimizer)
    assert optimizer.state == {model.weight: {"step": 3, "odd": True, "none": None}}
    group = optimizer.param_groups[0]
    assert [group[key] for key in ("lr", "distance", "momentum", "weight_decay")] == [0.1, 0.1, 0.8, 0.5]


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan, np.float64("inf")])
def test_numbers_that_json_does_not_have_are_restored(number):
    model, optimizer, initial = make()
    optimizer.state[model.weight]["best"] = number
    optimizer.param_groups[0]["limit"] = number
    state = json.loads(json.dumps(optimizer_json(model, optimizer, initial)[0], allow_nan=False))
    model, optimizer, _ = make()
    load(state, {}, model, optimizer)
    for restored in (optimizer.state[model.weight]["best"], optimizer.param_groups[0]["limit"]):
        assert restored == pytest.approx(number, nan_ok=True)


@pytest.mark.parametrize(
    "tensor",
    [torch.arange(4.0).view(2, 2), torch.arange(3), torch.tensor(2), torch.ones(2, 1).bfloat16(), torch.ones(5).bool()],
    ids=str,
)
def test_tensors_are_restored_with_their_dtype_and_shape_and_replace_all_state(tensor):
    model, optimizer, initial = make()
    optimizer.state[model.bias]["any"] = tensor
    (state, _), tensors = optimizer_json(model, optimizer, initial), state_tensors(model, optimizer)
    assert list(tensors) == ["bias//any"]
    model, optimizer, _ = make()
    optimizer.state[model.weight]["old"] = torch.ones(2)
    optimizer.state["global"] = 3
    load(state, {name: value.clone() for name, value in tensors.items()}, model, optimizer)
    assert optimizer.state.keys() == {model.bias, "global"}
    torch.testing.assert_close(optimizer.state[model.bias]["any"], tensor, rtol=0, atol=0)


def test_other_state_is_named_if_it_has_changed():
    model, optimizer, initial = make(betas=(0.9, 0.99), log=[1], array=np.ones(3), kind="a", none=None)
    assert optimizer_json(model, optimizer, initial) == ({"tensors": {}, "parameters": {}, "groups": [{}]}, [])
    optimizer.param_groups[0] |= {"betas": (0.9, 0.98), "new": "word", "momentum": None}
    optimizer.param_groups[0]["log"].append(2)
    optimizer.param_groups[0]["array"] += 1
    optimizer.state[model.weight]["history"] = [1.0]
    optimizer.state["global"] = 3
    state, unsaved = optimizer_json(model, optimizer, initial)
    assert state["groups"] == [{}]
    assert unsaved == ["array", "betas", "global", "history", "log", "momentum", "new"]


def test_a_tensor_in_a_group_is_named():
    assert optimizer_json(*make(scale=torch.ones(2)))[1] == ["scale"]  # it may be changed in place


class SlowWeights(torch.optim.SGD):
    """Creates its state when it is built, without a step."""

    def __init__(self, parameters):
        super().__init__(parameters)
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["slow"] = parameter.detach().clone()

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["slow"].lerp_(parameter - parameter.grad, 0.5)


@pytest.mark.parametrize("optimizer", [torch.optim.Adagrad, SlowWeights])
def test_the_state_with_which_an_optimizer_was_built_is_restored_and_that_of_a_used_one_is_not(optimizer):
    model = torch.nn.Linear(2, 2)
    optimizer = optimizer(model.parameters())
    initial = initial_state(model, optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for _ in range(2):  # a second time, the restored state has been changed too
        optimizer.step()
        load(VALID, {}, model, optimizer, initial)
        torch.testing.assert_close(initial_state(model, optimizer), initial, rtol=0, atol=0)
    for values in optimizer.state.values():
        values["step"] = torch.tensor(1.0)
    assert initial_state(model, optimizer) == {}


@pytest.mark.parametrize("key", ["a//b", "/a", "", "__metadata__", "β", "a\nb"])
def test_any_text_can_be_a_key(key):
    model, optimizer, initial = make()
    optimizer.state[model.weight][key] = torch.ones(2)
    (state, _), tensors = optimizer_json(model, optimizer, initial), state_tensors(model, optimizer)
    model, optimizer, _ = make()
    load(state, tensors, model, optimizer)
    assert list(optimizer.state[model.weight]) == [key]


VALID = {"tensors": {}, "parameters": {}, "groups": [{}]}


@pytest.mark.parametrize(
    "state",
    [
        None,
        3,
        {},
        {"parameters": {}, "groups": [{}]},
        VALID | {"tensors": []},
        VALID | {"groups": []},
        VALID | {"groups": {}},
        VALID | {"groups": [3]},
        VALID | {"groups": [{"params": 3}]},
        VALID | {"groups": [{"lr": 3}]},
        VALID | {"groups": [{"betas": [0.9, 0.9]}]},
        VALID | {"parameters": [1]},
        VALID | {"parameters": {"weight": 1}},
        VALID | {"parameters": {"weight": {"step": "3"}}},
    ],
)
def test_an_invalid_state_is_refused(state):
    model, optimizer, _ = make()
    with pytest.raises(CorruptCheckpoint, match=r"state\.json"):
        check_optimizer_state(Path("step"), state, {}, model, optimizer)
    check_optimizer_state(Path("step"), VALID, {}, model, optimizer)


@pytest.mark.parametrize(
    "tensors",
    [{}, {"weight//a": torch.ones(3)}, {"weight//a": torch.ones(2), "weight//b": torch.ones(1)}],
    ids=["missing", "other shape", "additional"],
)
def test_tensors_that_were_not_saved_are_refused(tensors):
    model, optimizer, _ = make()
    with pytest.raises(CorruptCheckpoint, match=r"weight//"):
        check_optimizer_state(Path("step"), VALID | {"tensors": {"weight//a": [2]}}, tensors, model, optimizer)


@pytest.mark.parametrize("state", [{"tensors": {"bias//a": [1]}}, {"parameters": {"bias": {"step": 3}}}])
def test_state_of_parameters_that_the_optimizer_does_not_hold_is_refused(state):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD([model.weight], lr=0.1)
    tensors = {name: torch.ones(shape) for name, shape in state.get("tensors", {}).items()}
    with pytest.raises(ResumeMismatch, match="bias"):
        check_optimizer_state(Path("step"), VALID | state, tensors, model, optimizer)


def test_fused_kernels_get_no_tensor_of_another_shape_or_dtype():
    """They do not check: with another shape they corrupt memory."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tensors = {"weight//step": torch.tensor(1.0), "weight//exp_avg": torch.ones(2, 2).bfloat16()}
    tensors["weight//exp_avg_sq"] = torch.ones(2, 3)
    state = VALID | {"tensors": {name: list(tensor.shape) for name, tensor in tensors.items()}}
    with pytest.raises(CorruptCheckpoint, match="weight//exp_avg_sq"):
        check_optimizer_state(Path("step"), state, tensors, model, optimizer)
    tensors["weight//exp_avg_sq"] = torch.ones(2, 2)
    state["tensors"]["weight//exp_avg_sq"] = [2, 2]
    load(state, tensors, model, optimizer)
    assert {t.dtype for t in optimizer.state[model.weight].values()} == {torch.float32}


@pytest.mark.parametrize("shape", [(2, 2), (2,), ()], ids=str)
@pytest.mark.parametrize("fused", [False, True])
def test_state_of_another_shape_keeps_its_dtype_with_half_precision_weights(fused, shape):
    """PyTorch casts all state to the dtype of the weights, in which 256 + 1 = 256."""
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(torch.ones(shape, dtype=torch.bfloat16))
    optimizer = AveragedOptimizer([torch.optim.AdamW(model.parameters(), fused=fused)], 0.9)
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    optimizer.state[model.weight] |= {"num_averaged": torch.tensor(256.0), "count": torch.tensor(2**30)}
    initial = group_settings(optimizer)
    (state, _), tensors = optimizer_json(model, optimizer, initial), state_tensors(model, optimizer)
    tensors = {name: value.clone() for name, value in tensors.items()}
    load(state, tensors, model, optimizer)
    assert {name: t.dtype for name, t in state_tensors(model, optimizer).items()} == {
        name: t.dtype for name, t in tensors.items()
    }
    optimizer.step()
    assert optimizer.state[model.weight]["num_averaged"] == 257
    assert optimizer.state[model.weight]["count"] == 2**30
