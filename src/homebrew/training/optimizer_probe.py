"""Checks, before a run, that a checkpoint can hold the state which a custom optimizer will have."""

import copy
import warnings
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from homebrew.checkpoint.optimizer_state import check_state
from homebrew.optim.combined import members, parameters_of
from homebrew.training.optimizer_modes import OptimizerModes


def check_future_state(optimizer: torch.optim.Optimizer) -> None:
    """Raise ConfigError if an optimizer keeps state that a checkpoint cannot hold.

    Most optimizers create their state in their first step, so a copy takes one, with gradients of zero. An optimizer
    that cannot be copied is checked when a checkpoint is saved. PyTorch's and homebrew's have no such state.
    """
    for member in members(optimizer):
        _check_future_state(member)


def _check_future_state(optimizer: torch.optim.Optimizer) -> None:
    check_state(optimizer)
    if type(optimizer).__module__.startswith(("torch.optim.", "homebrew.optim.")):
        return
    devices = {parameter.device for parameter in parameters_of(optimizer) if parameter.is_cuda}
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            torch.random.fork_rng(list(devices)),
            torch.compiler.set_stance("force_eager"),  # some compile their step, which takes longer than one step
        ):
            probe = _copy_with_few_parameters(optimizer)
            OptimizerModes(probe).train()
            probe.step()
    except Exception:  # whatever a custom optimizer raises that needs a closure, or its real parameters
        return
    check_state(probe)


def _copy_with_few_parameters(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Copy an optimizer, with one new parameter in place of all that have the same shape, dtype and device."""
    new: dict[tuple[Any, ...], Tensor] = {}
    probe = object.__new__(type(optimizer))
    memo: dict[int, Any] = {id(optimizer): probe}
    for parameter in parameters_of(optimizer):
        kind = (parameter.shape, parameter.dtype, parameter.device, parameter.requires_grad)
        memo[id(parameter)] = new.setdefault(kind, torch.zeros_like(parameter, requires_grad=parameter.requires_grad))
    # deepcopy(optimizer) would lose the attributes of subclasses. Hooks may have effects outside of the optimizer.
    probe.__dict__ = copy.deepcopy(optimizer.__dict__, memo)
    probe.__dict__ |= {name: OrderedDict() for name in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")}
    for group in probe.param_groups:
        group["params"] = list(dict.fromkeys(group["params"]))
    for parameter in new.values():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    return probe
