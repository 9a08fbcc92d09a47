import pytest
import torch
from accelerate import Accelerator

from homebrew.training.guard import Guard
from homebrew.training.update import Update, _Graph

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


class Replaying:
    """In a CUDA graph's place on a CPU: runs what was captured, and leaves the verdict where it was before."""

    captures = 0

    def __init__(self, graph):
        Replaying.captures += 1
        self.graph = graph
        self.known = graph._what_it_knows()
        graph._verdict = torch.zeros(4)

    def replay(self):
        assert self.graph._what_it_knows() == self.known  # or it would work on memory that is another's by now
        with self.graph._rates_on_device():
            self.graph._verdict.copy_(self.graph._update(self.graph._loss))


@pytest.fixture
def captures(monkeypatch):
    """How often an update was captured."""
    capture = _Graph._capture

    def counted(graph):
        if graph._loss.is_cuda:
            Replaying.captures += 1
            return capture(graph)
        return Replaying(graph)

    monkeypatch.setattr(_Graph, "_capture", counted)
    monkeypatch.setattr(Replaying, "captures", 0)
    return lambda: Replaying.captures


def run(device, *, as_graph, steps=10, in_place=False, move=None, change=None, bad=()):
    """Weights, optimizer state, norms and verdicts of an update with gradients that lie in the same places."""
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(5, 3, generator=generator).to(device)) for _ in range(3)]
    optimizer = torch.optim.AdamW(
        [{"params": parameters[:1], "weight_decay": 0.1}, {"params": parameters[1:]}], lr=0.1, fused=True
    )
    guard = Guard(optimizer, "skip", 100, parameters[0].device)
    update = Update(
        parameters,
        optimizer,
        guard,
        Accelerator(cpu=device == "cpu"),
        max_grad_norm=1.0,
        as_graph=as_graph,
        in_place=in_place,
    )
    update.begin()
    places = [torch.empty_like(p) for p in parameters]
    norms = []
    for step in range(steps):
        if step == move:
            places = [torch.empty_like(p) for p in parameters]
        if step == change:
            optimizer.param_groups[0]["betas"] = (0.5, 0.9)
        for parameter, place in zip(parameters, places, strict=True):
            place.copy_(torch.randn(5, 3, generator=generator))
            if in_place:
                parameter.grad += place
            else:
                parameter.grad = place
        for index, group in enumerate(optimizer.param_groups):
            group["lr"] = 0.1 / (step + 1 + index)
        norms.append(update(step, torch.tensor(float("nan") if step in bad else float(step), device=device)))
        assert all(p.grad is None or (in_place and not p.grad.any()) for p in parameters)
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == [0.1 / (step + 1), 0.1 / (step + 2)]
        assert all(type(rate) is float for rate in rates)
    state = [value for parameter in parameters for value in optimizer.state[parameter].values()]
    return [*(p.detach() for p in parameters), *state, torch.stack(norms)], guard.check()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("in_place", [False, True])
def test_a_graph_does_what_is_launched_otherwise(device, in_place, captures):
    plain, _ = run(device, as_graph=False)
    assert captures() == 0
    graphed, held_back = run(device, as_graph=True, in_place=in_place)
    assert captures() == 1
    assert held_back == []
    assert len({float(norm) for norm in graphed[-1]}) == 10  # none is another step's, overwritten
    for a, b in zip(plain, graphed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)  # the rates are float32 here, float64 there


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("what", ["move", "change"])
def test_it_is_captured_anew_when_gradients_lie_elsewhere_or_a_setting_differs(device, what, captures):
    plain, _ = run(device, as_graph=False, **{what: 5})
    graphed, _ = run(device, as_graph=True, **{what: 5})
    assert captures() == 2
    for a, b in zip(plain, graphed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("device", DEVICES)
def test_a_graph_holds_back_bad_steps_and_says_which(device, captures):
    whole, _ = run(device, as_graph=True, steps=7)
    graphed, held_back = run(device, as_graph=True, steps=9, bad=(7, 8))
    assert [held.step for held in held_back] == [7, 8]
    assert all(torch.equal(a, b) for a, b in zip(whole[:-1], graphed[:-1], strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_graph_or_not_the_arithmetic_is_the_same(device, captures, monkeypatch):
    graphed, _ = run(device, as_graph=True)
    assert captures() == 1
    monkeypatch.setattr(_Graph, "_what_it_knows", lambda graph: [object()])  # never twice the same: never captured
    launched, _ = run(device, as_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(graphed, launched, strict=True))
