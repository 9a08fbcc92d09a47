import pytest
import torch

from homebrew import ConfigError, Muon
from homebrew.optim.muon import orthogonalize

SHAPES = [(8, 8), (8, 24), (24, 8), (8, 24), (8, 8)]


def parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def train(optimizer, weights, steps=5):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()
    return weights


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"adjust_lr_fn": "match_rms_adamw"},
        {"nesterov": False, "momentum": 0.5},
        {"weight_decay": 0.0, "ns_steps": 3},
        {"ns_coefficients": (3.0, -3.2, 1.2), "eps": 1e-3},
    ],
)
def test_muon_equals_pytorchs(settings):
    ours, theirs = parameters(), parameters()
    train(Muon(ours, lr=0.02, **settings), ours)
    train(torch.optim.Muon(theirs, lr=0.02, **settings), theirs)
    for our, their, initial in zip(ours, theirs, parameters(), strict=True):
        torch.testing.assert_close(our, their, rtol=0, atol=0.02 * (their - initial).abs().max().item())  # bfloat16


def test_learning_rates_and_weight_decay_of_groups_are_used():
    together, (first, *others) = parameters(), parameters()
    groups = [{"params": [together[0]], "lr": 0.1, "weight_decay": 0.3}, {"params": together[1:]}]
    train(Muon(groups, lr=0.02), together, steps=1)
    generator = torch.Generator().manual_seed(1)
    for weight in (first, *others):
        weight.grad = torch.randn(weight.shape, generator=generator)
    Muon([first], lr=0.1, weight_decay=0.3).step()
    Muon(others, lr=0.02).step()
    for one, other in zip(together, (first, *others), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 8, 40), (2, 40, 8)])
def test_orthogonalize_keeps_singular_vectors_and_makes_singular_values_about_one(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = orthogonalize(x, ns_coefficients=(3.4445, -4.775, 2.0315), ns_steps=5, eps=1e-7, dtype=torch.float32)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    values = u.mT @ result @ vh.mT
    diagonal = torch.diagonal(values, dim1=-2, dim2=-1)
    assert 0.6 < diagonal.min()
    assert diagonal.max() < 1.25
    assert (values - torch.diag_embed(diagonal)).abs().max() < 1e-3


def test_a_gradient_of_zero_gives_no_update():
    zero = orthogonalize(
        torch.zeros(1, 4, 6), ns_coefficients=(3.4445, -4.775, 2.0315), ns_steps=5, eps=1e-7, dtype=torch.float32
    )
    assert torch.equal(zero, torch.zeros(1, 4, 6))


def test_large_matrices_are_updated_in_several_batches(monkeypatch):
    expected = train(Muon(parameters_ := parameters(), lr=0.02), parameters_)
    monkeypatch.setattr("homebrew.optim.muon._MAX_BATCH_ELEMENTS", 1)
    actual = train(Muon(parameters_ := parameters(), lr=0.02), parameters_)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_skipped_step_changes_nothing():
    weights = parameters()
    optimizer = Muon(weights, lr=0.02)
    train(optimizer, weights, steps=2)
    before = [tensor.clone() for w in weights for tensor in (w, optimizer.state[w]["momentum_buffer"])]
    for weight in weights:
        weight.grad = torch.full_like(weight, torch.nan)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert all(map(torch.equal, before, [t for w in weights for t in (w, optimizer.state[w]["momentum_buffer"])]))
    optimizer.found_inf = torch.tensor(0.0)
    train(optimizer, weights, steps=1)
    assert not torch.equal(before[0], weights[0])


def test_parameters_without_gradient_are_left_alone():
    weights = parameters()
    optimizer = Muon(weights, lr=0.02)
    before = weights[0].clone()
    for weight in weights[1:]:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert torch.equal(weights[0], before)
    assert weights[0] not in optimizer.state


def test_step_returns_the_result_of_a_closure():
    weights = parameters()
    optimizer = Muon(weights, lr=0.02)

    def closure():
        loss = sum((weight**2).sum() for weight in weights)
        loss.backward()
        return loss

    before = closure().item()
    assert optimizer.step(closure).item() == before
    assert closure().item() < before


@pytest.mark.parametrize("number", [0, 5])
def test_matrices_that_do_not_divide_a_parameter_are_an_error(number):
    with pytest.raises(ConfigError, match=f"num_matrices={number} does not divide the 24 rows"):
        Muon([{"params": [torch.nn.Parameter(torch.ones(24, 8))], "num_matrices": number}])
