"""Passes of a model in evaluation mode, uncompiled, and without a trace."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from homebrew.model.passes import eval_mode, trial, uncompiled


@pytest.mark.parametrize("first_to_end", [0, 1])
def test_overlapping_contexts_end_with_the_last_one(first_to_end):
    model = nn.Linear(1, 1)
    contexts = [eval_mode(model), eval_mode(model)]
    for context in contexts:
        context.__enter__()
    contexts.pop(first_to_end).__exit__(None, None, None)
    assert not model.training
    contexts.pop().__exit__(None, None, None)
    assert model.training


def test_the_mode_of_each_submodule_is_restored():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.Dropout()))
    model[1].eval()
    model[1][1].train()
    modes = [module.training for module in model.modules()]
    with eval_mode(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == modes


class Double(nn.Module):
    def forward(self, x):
        return 2 * x


def test_modules_are_compiled_again_afterwards():
    model = nn.Sequential(Double(), nn.Sequential(Double()))
    graphs = []
    for module in (model[0], model[1][0]):
        module.compile(backend=lambda graph, _: graphs.append(graph) or graph.forward)
    calls = [module._compiled_call_impl for module in model.modules()]
    with uncompiled(model):
        assert model(torch.ones(1)) == 4
        assert not graphs
    assert [module._compiled_call_impl for module in model.modules()] == calls
    assert model(torch.ones(1)) == 4
    assert graphs


class Counts(nn.Module):
    """Changes buffers in place and by assignment, and has one that cannot be written to."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("num_calls", torch.zeros(()))
        self.register_buffer("expanded", torch.ones(1).expand(3), persistent=False)
        self.register_buffer("missing", None)

    def forward(self, x):
        self.num_calls = self.num_calls + 1
        return nn.functional.dropout(self.norm(x), 0.5, self.training)


@pytest.mark.parametrize("error", [None, ValueError])
def test_a_trial_changes_nothing(error):
    model = Counts()
    model.norm.eval()
    buffers = dict(model.named_buffers())
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    state = torch.get_rng_state()
    with pytest.raises(error) if error else nullcontext(), trial(model):
        assert not model.training
        model.train()(torch.randn(4, 2))
        assert model.num_calls == 1
        if error:
            raise error
    assert [module.training for module in model.modules()] == [True, False]
    assert all(buffer is buffers[name] and buffer.equal(before[name]) for name, buffer in model.named_buffers())
    assert torch.equal(torch.get_rng_state(), state)
