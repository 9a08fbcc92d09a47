import pytest
import torch

from homebrew.model.eval_mode import eval_mode


@pytest.mark.parametrize("first_to_end", [0, 1])
def test_overlapping_contexts_end_with_the_last_one(first_to_end):
    model = torch.nn.Linear(1, 1)
    contexts = [eval_mode(model), eval_mode(model)]
    for context in contexts:
        context.__enter__()
    contexts.pop(first_to_end).__exit__(None, None, None)
    assert not model.training
    contexts.pop().__exit__(None, None, None)
    assert model.training


def test_the_mode_of_each_submodule_is_restored():
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout()))
    model[1].eval()
    model[1][1].train()
    modes = [module.training for module in model.modules()]
    with eval_mode(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == modes
