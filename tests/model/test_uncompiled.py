import torch
from torch import nn

from homebrew.model.uncompiled import uncompiled


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
