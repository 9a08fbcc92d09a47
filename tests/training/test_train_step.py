from copy import deepcopy

import pytest
import torch
from accelerate import Accelerator

from homebrew import GPT, GPTConfig
from homebrew.training.nan_guard import NanGuard
from homebrew.training.optimizer import adamw
from homebrew.training.train_step import TrainStep

SHAPE = GPTConfig(block_size=8, vocab_size=64, n_layer=2, n_head=2, n_embd=16, dropout=0.1)


class Run:
    """Steps on random tokens, and all that they leave behind."""

    def __init__(self, device, *, graphs, num_micro_batches=1, policy="skip", zscore=None):
        accelerator = Accelerator(cpu=device == "cpu", mixed_precision="no")
        self.model = GPT(SHAPE).to(device).train()
        self.optimizer = adamw(self.model, learning_rate=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
        self.guard = NanGuard(self.optimizer, policy, 100, self.model.device, spike_zscore=zscore)
        self.num_micro_batches = num_micro_batches
        self.step = TrainStep(
            self.model,
            self.optimizer,
            self.guard,
            accelerator,
            max_grad_norm=1.0,
            sums_in_place=graphs and num_micro_batches > 1,
            update_as_graph=graphs,
        )
        self.generator = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        self.step.begin()
        self.numbers = []

    def take(self, count, spoil=lambda: None):
        for _ in range(count):
            ids = torch.randint(64, (self.num_micro_batches, 4, 9), generator=self.generator).to(self.model.device)
            spoil()
            for index, group in enumerate(self.optimizer.param_groups):
                group["lr"] = 1e-2 / (len(self.numbers) + 1 + index)
            rates = [group["lr"] for group in self.optimizer.param_groups]
            micro_batches = [(batch[:, :-1].contiguous(), batch[:, 1:].contiguous()) for batch in ids]
            verdict = self.step(micro_batches)
            self.guard.record(len(self.numbers), verdict)
            self.numbers.append(verdict)
            assert [group["lr"] for group in self.optimizer.param_groups] == rates
            assert all(type(group["lr"]) is float for group in self.optimizer.param_groups)
        return self

    def left(self):
        of = self.optimizer.state
        states = [of[p][key] for p in self.model.parameters() for key in sorted(of[p])]
        return [*(p.detach() for p in self.model.parameters()), *states, torch.stack(self.numbers)]

    def held_back(self):
        self.guard.send()
        return self.guard.check()


def assert_same(one, other, **tolerance):
    for a, b in zip(one.left(), other.left(), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("num_micro_batches", [1, 3])
def test_a_step_of_graphs_is_the_step_itself(device, num_micro_batches, captured):
    plain = Run(device, graphs=False, num_micro_batches=num_micro_batches).take(8)
    assert captured == []
    graphed = Run(device, graphs=True, num_micro_batches=num_micro_batches).take(8)
    assert len(captured) == 1 or num_micro_batches == 1  # whose gradients nothing keeps in one place here
    assert_same(plain, graphed, rtol=2e-5, atol=2e-6)  # its learning rates are float32
    assert len({float(norm) for _, _, _, norm in graphed.numbers}) == 8  # none is another step's, overwritten


@pytest.mark.parametrize("num_micro_batches", [1, 3])
def test_captured_or_not_the_arithmetic_is_the_same(device, num_micro_batches, captured, monkeypatch):
    graphed = Run(device, graphs=True, num_micro_batches=num_micro_batches).take(8)
    monkeypatch.setattr(TrainStep, "_touched", lambda _: [object()])  # never as before, so never captured
    launched = Run(device, graphs=True, num_micro_batches=num_micro_batches).take(8)
    exact = {"rtol": 0, "atol": 0} if device == "cpu" else {"rtol": 2e-5, "atol": 2e-6}  # gradients add up by atomics
    assert_same(graphed, launched, **exact)


@pytest.mark.parametrize("num_micro_batches", [1, 3])
def test_what_a_graph_would_not_notice_has_it_captured_anew(device, num_micro_batches, captured):
    captures = []

    def change(run):
        def take():
            run.take(4)
            captures.append(len(captured))

        take()
        run.optimizer.param_groups[0]["betas"] = (0.5, 0.9)
        take()
        for parameter in run.model.parameters():  # as a callback may that puts averaged weights in
            parameter.data = parameter.data * 0.5
        take()
        run.optimizer.load_state_dict(deepcopy(run.optimizer.state_dict()))
        take()
        run.model.transformer.wpe.weight.requires_grad = False
        take()
        run.model.transformer.wpe.weight.requires_grad = True
        run.step.begin()
        run.model.zero_grad(set_to_none=num_micro_batches == 1)
        take()
        return run

    plain = change(Run(device, graphs=False, num_micro_batches=num_micro_batches))
    graphed = change(Run(device, graphs=True, num_micro_batches=num_micro_batches))
    assert_same(plain, graphed, rtol=2e-5, atol=2e-6)
    assert captures[6:] == [1, 2, 3, 4, 5, 6] or num_micro_batches == 1


@pytest.mark.parametrize("num_micro_batches", [1, 3])
def test_graphs_hold_bad_steps_back_and_say_which(device, num_micro_batches, captured):
    # With one micro-batch nothing keeps gradients in one place here, as the compiler's graphs do.
    run = Run(device, graphs=True, num_micro_batches=num_micro_batches).take(6)
    before = [value.clone() for value in run.left()[:-1]]
    weight = run.model.transformer.ln_f.bias
    good = weight.detach().clone()
    run.take(2, spoil=lambda: weight.data.fill_(float("nan")))
    weight.data.copy_(good)
    assert all(torch.equal(a, b) for a, b in zip(before, run.left()[:-1], strict=True))
    assert [held.step for held in run.held_back()] == [6, 7]
    run.take(1)
    assert not torch.equal(before[0], run.left()[0])


def test_sums_have_their_memory_before_a_graph_writes_its_gradients():
    run = Run("cpu", graphs=True, num_micro_batches=2)
    there = []
    run.model.register_forward_pre_hook(
        lambda *_: there.append(all(p.grad is not None for p in run.model.parameters()))
    )
    run.take(1)
    run.model.zero_grad(set_to_none=True)  # as warm_up_compiled does, or a callback may
    run.take(1)
    assert there == [True] * 4


def test_gradients_do_not_outlive_a_step_that_no_graph_takes():
    run = Run("cpu", graphs=False, num_micro_batches=2).take(1)
    assert all(parameter.grad is None for parameter in run.model.parameters())


def test_a_step_knows_that_it_was_broken_off(monkeypatch):
    run = Run("cpu", graphs=False).take(1)
    assert not run.step.broken_off
    monkeypatch.setattr(run.guard, "judge", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.take(1)
    assert run.step.broken_off
    run.step.begin()
    assert not run.step.broken_off
    assert all(parameter.grad is None for parameter in run.model.parameters())


@pytest.mark.parametrize(("policy", "zscore"), [("raise", None), ("skip", 3.0), ("raise", 3.0)])
def test_the_guard_remembers_what_happened_in_a_graph(device, policy, zscore, captured, monkeypatch):
    monkeypatch.setattr("homebrew.training.nan_guard.SPIKE_WARMUP", 6)
    runs = []
    for graphs in (False, True):
        run = Run(device, graphs=graphs, num_micro_batches=2, policy=policy, zscore=zscore).take(8)
        embedding = run.model.transformer.wte.weight
        good = embedding.detach().clone()
        run.take(1, spoil=lambda weight=embedding: weight.data.mul_(50.0))
        embedding.data.copy_(good)
        run.take(1)
        run.take(1, spoil=lambda weight=embedding: weight.data.fill_(float("nan")))
        embedding.data.copy_(good)
        runs.append(run.take(1))
    plain, graphed = runs
    assert captured
    assert_same(plain, graphed, rtol=2e-5, atol=2e-6, equal_nan=True)
    found = [[(held.step, held.reason) for held in run.held_back()] for run in runs]
    assert found[0] == found[1]
    assert ("loss_spike" in dict(found[0]).values()) is (zscore is not None)
    torch.testing.assert_close(plain.guard.state_dict()["history"], graphed.guard.state_dict()["history"])
