"""One optimizer step, with and without CUDA graphs; on a CPU a replay runs recorded operations (`captured`)."""

from copy import copy, deepcopy

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from homebrew import GPT, GPTConfig, LoRAConfig
from homebrew.errors import ConfigError, TrainingError
from homebrew.model.language_model import module_loss
from homebrew.model.lora import add_lora
from homebrew.optim.averaged import AveragedOptimizer
from homebrew.optim.combined import combine
from homebrew.training.nan_guard import NanGuard
from homebrew.training.optimizer import adamw, muon_and_adamw
from homebrew.training.train_step import TrainStep

CONFIG = GPTConfig(block_size=8, vocab_size=64, n_layer=2, n_head=2, n_embd=16, dropout=0.1)


OPTIMIZERS = {
    "adamw": lambda model, **settings: adamw(model.parameters(), **settings),
    "muon": lambda model, **settings: combine(muon_and_adamw(model, momentum=0.95, **settings)),
    "averaged": lambda model, **settings: AveragedOptimizer([adamw(model.parameters(), **settings)], 0.9),
}


class Steps:
    """Takes steps on random tokens and keeps their results."""

    def __init__(
        self,
        device,
        *,
        graphs=None,
        num_micro_batches=1,
        policy="skip",
        zscore=None,
        accelerator_class=Accelerator,
        optimizer="adamw",
    ):
        self.accelerator = accelerator_class(cpu=device == "cpu", mixed_precision="no")
        self.model = GPT(CONFIG).to(device).train()
        settings = {"learning_rate": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
        self.optimizer = OPTIMIZERS[optimizer](self.model, **settings)
        self.guard = NanGuard(self.optimizer, policy, 100, self.model.device, spike_zscore=zscore)
        self.num_micro_batches = num_micro_batches
        self.graphs = graphs
        self.build()
        self.generator = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        self.train_step.reset()
        self.results = []

    def build(self):
        """Build the TrainStep, again after a change of the model or the optimizer."""
        self.train_step = TrainStep(
            self.model,
            self.optimizer,
            self.guard,
            self.accelerator,
            loss_function=module_loss,
            max_grad_norm=1.0,
            accumulate_in_place=self.graphs == "all" or (bool(self.graphs) and self.num_micro_batches > 1),
            capture_passes=self.graphs == "all",
            capture_update=bool(self.graphs),
        )

    def take(self, count, before_step=lambda: None):
        for _ in range(count):
            ids = torch.randint(64, (self.num_micro_batches, 4, 9), generator=self.generator).to(self.model.device)
            before_step()
            for index, group in enumerate(self.optimizer.param_groups):
                group["lr"] = 1e-2 / (len(self.results) + 1 + index)
            options = [dict(group) for group in self.optimizer.param_groups]
            micro_batches = [(batch[:, :-1].contiguous(), batch[:, 1:].contiguous()) for batch in ids]
            self.results.append(self.train_step(micro_batches))
            assert self.optimizer.param_groups == options
            assert all(type(group["lr"]) is float for group in self.optimizer.param_groups)
        return self

    def state(self):
        """Return the weights and the optimizer's state."""
        of = self.optimizer.state
        states = [of[p][key] for p in self.model.parameters() for key in sorted(of[p])]
        return [*(p.detach() for p in self.model.parameters()), *states]

    def skipped(self):
        """Return the skipped steps and their reasons, up to the one that ends the run."""
        skipped = []
        for step, result in enumerate(self.results):
            skipped_step, error = self.guard.handle(step, result.tolist())
            skipped += [(skipped_step.step, skipped_step.reason)] if skipped_step else []
            if error is not None:
                break
        return skipped


GRAPHS = ["update", "all"]
"""What is captured: the update, or also the forward and backward passes of a model that is not compiled."""


def assert_same(one, other, **tolerance):
    for a, b in zip([*one.state(), *one.results], [*other.state(), *other.results], strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def tolerance(device, optimizer):
    """A graph reads float32 learning rates. On a GPU gradients are summed by atomics, and Muon rounds to bfloat16."""
    return {"rtol": 1e-3, "atol": 1e-3} if (device, optimizer) == ("cuda", "muon") else {"rtol": 2e-5, "atol": 2e-6}


@pytest.mark.parametrize("graphs", GRAPHS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("num_micro_batches", [1, 3])
def test_a_graph_computes_the_same_steps(device, num_micro_batches, captured, optimizer, graphs):
    eager = Steps(device, graphs=None, num_micro_batches=num_micro_batches, optimizer=optimizer).take(8)
    assert captured == []
    graphed = Steps(device, graphs=graphs, num_micro_batches=num_micro_batches, optimizer=optimizer).take(8)
    # Without accumulation in place, gradients stay at one address only if the compiler's CUDA graphs keep them there.
    assert len(captured) == (2 if graphs == "all" else 1) or num_micro_batches == 1
    assert_same(eager, graphed, **tolerance(device, optimizer))
    assert len({float(grad_norm) for _, _, _, grad_norm in graphed.results}) == 8  # no replay overwrites a result


@pytest.mark.parametrize("graphs", GRAPHS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_change_that_a_graph_cannot_see_makes_it_capture_again(device, captured, optimizer, graphs):
    num_captured = []

    def take_with_changes(steps):
        def take():
            steps.take(4)
            num_captured.append(len(captured))

        take()
        steps.optimizer.param_groups[0] |= {"momentum": 0.5} if optimizer == "muon" else {"betas": (0.5, 0.9)}
        take()
        for parameter in steps.model.parameters():  # as a callback does that swaps in averaged weights
            parameter.data = parameter.data * 0.5
        take()
        steps.optimizer.load_state_dict(deepcopy(steps.optimizer.state_dict()))
        take()
        steps.model.transformer.wpe.weight.requires_grad = False
        take()
        steps.model.transformer.wpe.weight.requires_grad = True
        steps.train_step.reset()
        steps.model.zero_grad(set_to_none=False)
        take()
        return steps

    eager = take_with_changes(Steps(device, graphs=None, num_micro_batches=3, optimizer=optimizer))
    graphed = take_with_changes(Steps(device, graphs=graphs, num_micro_batches=3, optimizer=optimizer))
    assert_same(eager, graphed, **tolerance(device, optimizer))
    assert num_captured == [0] * 6 + ([1, 2, 3, 4, 5, 6] if graphs == "update" else [2, 3, 5, 6, 8, 10])


@pytest.mark.parametrize("graphs", GRAPHS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_graph_skips_non_finite_steps(device, captured, optimizer, graphs):
    steps = Steps(device, graphs=graphs, num_micro_batches=3, optimizer=optimizer).take(6)
    before = [value.clone() for value in steps.state()]
    hook = steps.model.transformer.ln_f.bias.register_hook(lambda gradient: gradient * torch.nan)
    steps.take(2)
    hook.remove()
    assert all(torch.equal(a, b) for a, b in zip(before, steps.state(), strict=True))
    assert steps.skipped() == [(6, "non_finite"), (7, "non_finite")]
    steps.take(1)
    assert not torch.equal(before[0], steps.state()[0])


@pytest.mark.parametrize("graphs", GRAPHS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("policy", "zscore"), [("raise", None), ("skip", 3.0), ("raise", 3.0)])
def test_a_graph_keeps_the_guard_state(device, policy, zscore, captured, optimizer, graphs, monkeypatch):
    monkeypatch.setattr("homebrew.training.nan_guard.SPIKE_WARMUP", 6)
    runs = []
    for kind in (None, graphs):
        steps = Steps(device, graphs=kind, num_micro_batches=2, policy=policy, zscore=zscore, optimizer=optimizer).take(
            8
        )
        embedding = steps.model.transformer.wte.weight
        original = embedding.detach().clone()
        steps.take(1, before_step=lambda weight=embedding: weight.data.mul_(50.0))
        embedding.data.copy_(original)
        steps.take(1)
        steps.take(1, before_step=lambda weight=embedding: weight.data.fill_(float("nan")))
        embedding.data.copy_(original)
        runs.append(steps.take(1))
    eager, graphed = runs
    assert captured
    assert_same(eager, graphed, **tolerance(device, optimizer), equal_nan=True)
    skipped = eager.skipped()
    assert skipped == graphed.skipped()
    assert ("loss_spike" in dict(skipped).values()) is (zscore is not None)
    torch.testing.assert_close(eager.guard.state_dict()["history"], graphed.guard.state_dict()["history"])


HOOKS = {
    "forward": lambda norm: norm.register_forward_hook,
    "forward_pre": lambda norm: norm.register_forward_pre_hook,
    "full_backward": lambda norm: norm.register_full_backward_hook,
    "full_backward_pre": lambda norm: norm.register_full_backward_pre_hook,
    "parameter": lambda norm: norm.bias.register_hook,
    "accumulated": lambda norm: norm.bias.register_post_accumulate_grad_hook,
    "global_forward": lambda _: register_module_forward_hook,
    "global_forward_pre": lambda _: register_module_forward_pre_hook,
}


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_are_called_in_each_pass(captured, kind):
    steps = Steps("cpu", graphs="all", num_micro_batches=2).take(3)
    norm = steps.model.transformer.ln_f
    calls = []

    def record(caller, *_):
        if not isinstance(caller, torch.nn.Module) or caller is norm:  # a global hook is called for all modules
            calls.append(caller)

    hook = HOOKS[kind](norm)(record)
    steps.take(3)
    hook.remove()
    steps.take(3)
    assert captured
    assert len(calls) == 6


def take_before_and_after(change):
    """Return an eager and a captured run of three steps before and three after a change."""
    runs = []
    for graphs in (None, "all"):
        steps = Steps("cpu", graphs=graphs, num_micro_batches=2).take(3)
        change(steps)
        runs.append(steps.take(3))
    return runs


def double_the_norm(model):
    norm = model.transformer.ln_f
    norm.forward = lambda x: 2 * F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias)


@pytest.mark.parametrize(
    "change", [lambda m: m.transformer.eval(), lambda m: setattr(m.transformer, "dropout", 0.9), double_the_norm]
)
def test_a_changed_attribute_of_a_module_is_used(captured, change):
    runs = take_before_and_after(lambda steps: change(steps.model))
    assert len(captured) == 3
    assert_same(*runs, **tolerance("cpu", "adamw"))


def test_another_number_of_micro_batches_is_used(captured):
    runs = take_before_and_after(lambda steps: setattr(steps, "num_micro_batches", 3))
    assert captured
    assert_same(*runs, **tolerance("cpu", "adamw"))


def swap_blocks(model):
    blocks = model.transformer.h
    blocks[0], blocks[1] = blocks[1], blocks[0]


def add_a_dropout(model):
    model.transformer.ln_f = torch.nn.Sequential(model.transformer.ln_f, torch.nn.Dropout(0.5))


@pytest.mark.parametrize(
    "change",
    [
        swap_blocks,
        add_a_dropout,
        lambda model: model.enable_activation_checkpointing(),
        lambda model: model.transformer.ln_f.compile(backend="eager"),
    ],
)
def test_a_changed_module_is_used(captured, change):
    runs = take_before_and_after(lambda steps: change(steps.model))
    assert len(captured) == 2
    assert_same(*runs, **tolerance("cpu", "adamw"))


def test_the_graph_of_an_earlier_loss_is_not_used(device, captured):
    """PyTorch would wait in the capture for the stream that the loss was computed on, which is an error."""
    steps = Steps(device, graphs="all", num_micro_batches=2)
    ids = torch.zeros(1, 8, dtype=torch.int64, device=device)
    loss = steps.model(ids, ids)  # as in a notebook, whose variables keep it alive
    calls = []
    weight = steps.model.transformer.ln_f.weight
    get_gradient_edge(weight).node.register_prehook(lambda *_: calls.append(1))
    steps.train_step.reset()
    steps.take(3)
    assert captured
    assert not calls
    loss.backward()
    assert weight.grad.any()


@pytest.mark.filterwarnings("ignore:Anomaly Detection", "ignore:Error detected")
def test_anomalies_are_detected_in_each_pass(captured):
    steps = Steps("cpu", graphs="all", num_micro_batches=2)
    with torch.autograd.set_detect_anomaly(True):
        steps.take(3)
        steps.model.transformer.ln_f.bias.data.fill_(float("nan"))
        with pytest.raises(RuntimeError, match="nan values"):
            steps.take(1)


def test_accumulation_in_place_allocates_gradients_before_the_first_backward():
    steps = Steps("cpu", graphs="update", num_micro_batches=2)
    is_allocated = []
    steps.model.register_forward_pre_hook(
        lambda *_: is_allocated.append(all(p.grad is not None for p in steps.model.parameters()))
    )
    steps.take(1)
    steps.model.zero_grad(set_to_none=True)  # as warm_up_compiled does, or a callback may
    steps.take(1)
    assert is_allocated == [True] * 4


def test_gradients_are_freed_after_a_step_without_graphs():
    steps = Steps("cpu", graphs=None, num_micro_batches=2).take(1)
    assert all(parameter.grad is None for parameter in steps.model.parameters())


def test_start_clears_the_gradients_of_a_step_that_raised():
    steps = Steps("cpu", graphs=None, num_micro_batches=2).take(1)
    hook = steps.model.transformer.ln_f.bias.register_hook(lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        steps.take(1)
    hook.remove()
    assert any(parameter.grad is not None for parameter in steps.model.parameters())
    steps.train_step.reset()
    assert all(parameter.grad is None for parameter in steps.model.parameters())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_graph_reads_learning_rates_from_tensors(captured, optimizer):
    steps = Steps("cpu", graphs="update", num_micro_batches=2, optimizer=optimizer)
    read = []
    steps.optimizer.register_step_pre_hook(
        lambda optimizer, *_: read.append([group["lr"] for group in optimizer.param_groups])
    )
    steps.take(4)
    assert captured
    assert all(isinstance(rate, torch.Tensor) for rates in read for rate in rates)
    assert len({id(rates[0]) for rates in read}) == 1, "a replay reads the address that was captured"


def test_learning_rates_of_a_graph_are_on_the_device_of_the_accelerator(captured):
    steps = Steps("cpu", graphs="update", num_micro_batches=2)
    with torch.device("meta"):
        steps.build()
    steps.take(3)
    assert captured
    assert all(result.isfinite().all() for result in steps.results)


class TwinRanks(Accelerator):
    """One of two ranks that compute the same, so that a sum is twice, and a mean equal to, this rank's value."""

    num_processes = 2

    def reduce(self, tensor, reduction="mean"):
        return {"sum": 2 * tensor, "mean": tensor}[reduction]

    def no_sync(self, model):
        self.not_synchronized = [*getattr(self, "not_synchronized", []), model]
        return super().no_sync(model)


@pytest.mark.parametrize("num_micro_batches", [1, 3])
def test_the_loss_is_summed_and_the_gradients_are_averaged_over_ranks(num_micro_batches):
    alone = Steps("cpu", num_micro_batches=num_micro_batches).take(3)
    assert_same(alone, Steps("cpu", num_micro_batches=num_micro_batches, accelerator_class=TwinRanks).take(3))


def test_gradients_are_synchronized_in_the_last_micro_batch_only():
    steps = Steps("cpu", num_micro_batches=3, accelerator_class=TwinRanks).take(2)
    assert steps.accelerator.not_synchronized == [steps.model] * 4


def test_gathered_weights_are_freed_after_the_last_micro_batch_only(monkeypatch):
    frees = []
    monkeypatch.setattr("homebrew.training.train_step.keeps_weights_gathered", lambda accelerator: True)
    steps = Steps("cpu", num_micro_batches=3)
    steps.model.set_reshard_after_backward = frees.append
    steps.take(2)
    assert frees == [False, False, True] * 2


def test_fsdp_cannot_continue_after_a_step_that_raised(monkeypatch):
    steps = Steps("cpu")
    monkeypatch.setattr("homebrew.training.train_step.uses_fsdp", lambda accelerator: True)
    steps.build()
    steps.train_step.reset()
    steps.train_step.reset()
    steps.take(1)
    steps.train_step.reset()
    hook = steps.model.transformer.ln_f.bias.register_hook(lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        steps.take(1)
    hook.remove()
    with pytest.raises(TrainingError, match="FSDP"):
        steps.train_step.reset()


def test_fsdp_may_replace_parameters(monkeypatch):
    steps = Steps("cpu")
    monkeypatch.setattr("homebrew.training.train_step.uses_fsdp", lambda accelerator: True)
    steps.build()
    steps.model.transformer.ln_f.bias = torch.nn.Parameter(torch.zeros(16))
    steps.train_step.check_parameters()


class Wrapper(torch.nn.Module):
    """Names parameters as DDP does."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *inputs):
        return self.module(*inputs)


@pytest.mark.parametrize("wrap", [lambda model: model, Wrapper], ids=["plain", "wrapped"])
def test_an_error_names_the_parameter_that_was_replaced(wrap):
    steps = Steps("cpu")
    model, steps.model = steps.model, wrap(steps.model)
    steps.build()
    steps.train_step.check_parameters()
    model.transformer.ln_f.bias = torch.nn.Parameter(torch.zeros(16))
    with pytest.raises(TrainingError, match=r"parameter transformer\.ln_f\.bias "):
        steps.train_step.check_parameters()


@pytest.mark.parametrize("wrap", [lambda model: model, Wrapper], ids=["plain", "wrapped"])
@pytest.mark.parametrize("adapter", [True, False])
def test_an_error_names_the_parameter_that_was_frozen_with_ddp_or_lora(monkeypatch, adapter, wrap):
    steps = Steps("cpu")
    if adapter:
        add_lora(steps.model, LoRAConfig())
    else:
        monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.MULTI_CPU)
    steps.model = wrap(steps.model)
    steps.build()
    steps.train_step.check_parameters()
    parameters = {name: p for name, p in steps.model.named_parameters() if p.requires_grad}
    parameters.popitem()[1].requires_grad = False
    name, parameter = parameters.popitem()
    parameter.requires_grad = False
    with pytest.raises(TrainingError, match=rf"requires_grad of {name.removeprefix('module.')} "):
        steps.train_step.check_parameters()


@pytest.mark.parametrize("num_micro_batches", [1, 3])
@pytest.mark.parametrize("num_steps", [0, 1, 4])
def test_with_ddp_a_parameter_without_gradient_is_an_error_in_any_step(monkeypatch, num_steps, num_micro_batches):
    """DDP would not reduce the gradients of the others."""
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.MULTI_CPU)
    steps = Steps("cpu", num_micro_batches=num_micro_batches).take(num_steps)
    monkeypatch.setattr(steps.model.transformer.wpe, "forward", lambda positions: torch.zeros(16))
    with pytest.raises(TrainingError, match=r"without gradient: 1, such as transformer\.wpe\.weight"):
        steps.take(1)


def test_a_parameter_that_the_optimizer_lacks_must_not_be_unfrozen():
    steps = Steps("cpu")
    weight = steps.model.transformer.wpe.weight.requires_grad_(False)
    steps.optimizer = torch.optim.SGD([p for p in steps.model.parameters() if p.requires_grad], lr=0.1)
    steps.guard = NanGuard(steps.optimizer, "skip", 100, steps.model.device)
    steps.build()
    steps.take(1)
    weight.requires_grad_(True)
    with pytest.raises(ConfigError, match=r"transformer\.wpe\.weight"):
        steps.take(1)


def freeze(model):
    model.transformer.wpe.weight.requires_grad = False


def replace_a_module(model):
    model.transformer.h[0] = copy(model.transformer.h[0])


@pytest.mark.parametrize("change", [freeze, replace_a_module])
def test_an_accepted_change_is_examined_once(monkeypatch, change):
    steps = Steps("cpu").take(1)
    calls, named_parameters = [], steps.model.named_parameters
    monkeypatch.setattr(
        steps.model, "named_parameters", lambda *args, **kw: calls.append(1) or named_parameters(*args, **kw)
    )
    steps.take(1)
    assert not calls
    change(steps.model)
    steps.take(1)
    assert calls
    calls.clear()
    steps.take(2)
    assert not calls


@pytest.mark.parametrize("scaler", [None, torch.amp.GradScaler("cpu")], ids=["float32", "scaler"])
def test_only_a_gradient_scaler_sees_non_finite_steps_of_a_plain_optimizer(scaler):
    steps = Steps("cpu")
    steps.optimizer = torch.optim.SGD(steps.model.parameters(), lr=0.1)
    steps.guard = NanGuard(steps.optimizer, "skip", 100, steps.model.device)
    steps.accelerator.scaler = scaler
    steps.build()
    calls = []
    steps.optimizer.register_step_pre_hook(lambda *_: calls.append(1))
    steps.take(1)
    steps.take(1, before_step=lambda: steps.model.transformer.ln_f.bias.data.fill_(float("nan")))
    assert len(calls) == (1 if scaler is None else 2)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DataLoader worker (pid 1) is killed"),
        torch.OutOfMemoryError("full"),
        torch.AcceleratorError("CUDA error: device-side assert triggered"),
    ],
)
def test_the_trainer_explains_some_errors_of_a_step(error):
    with pytest.raises(type(error)) as raised:
        take_with_an_error_of_the_optimizer(error)
    assert raised.value is error


@pytest.mark.parametrize("error", [RuntimeError("no DataLoader"), ValueError("x")])
def test_an_error_of_the_optimizer_names_it(error):
    with pytest.raises(TrainingError, match=rf"AdamW\.step\(\) failed: .*{error.args[0]}") as raised:
        take_with_an_error_of_the_optimizer(error)
    assert raised.value.__cause__ is error


def take_with_an_error_of_the_optimizer(error):
    def fail(*_):
        raise error

    steps = Steps("cpu")
    steps.optimizer.register_step_pre_hook(fail)
    steps.take(1)
