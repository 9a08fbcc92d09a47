from contextlib import nullcontext

import pytest
import torch
from torch import nn

from homebrew.model.trial import trial


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
