import contextlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend
from torch import nn

from homebrew import GPT, GPTConfig
from homebrew.training import compile as compilation
from homebrew.training.compile import LAUNCH_BOUND_FLOPS, _rng_forked, compile_model, warm_up_compiled
from homebrew.training.batch_size import BatchPlan

SCRIPT = """
import sys, torch
from homebrew import Callback, GPTConfig, TokenDataset, Trainer, TrainerConfig

class Losses(Callback):
    def on_log(self, trainer, metrics):
        print("loss", metrics.loss)

data = TokenDataset.from_tokens(torch.arange(400) % 61, 8, vocab_size=64)
shape = GPTConfig(block_size=8, vocab_size=64, n_layer=1, n_head=1, n_embd=8, dropout=0.1)
config = TrainerConfig(output_dir=sys.argv[1], max_steps=3, micro_batch_size=2, compile=True, log_every=1)
Trainer(shape, data, config=config, callbacks=[Losses()]).train()
"""


@pytest.mark.slow
def test_a_damaged_cache_only_costs_time(tmp_path):
    cache = tmp_path / "cache"

    def run(name):
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache)}
        command = [sys.executable, "-c", SCRIPT, str(tmp_path / name)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return [line for line in done.stdout.splitlines() if line.startswith("loss")], done.stderr

    cold, said = run("cold")
    assert len(cold) == 3
    assert "damaged" not in said
    for file in [path for path in cache.rglob("*") if path.suffix in (".py", ".so")]:
        os.truncate(file, file.stat().st_size // 2)
    again, said = run("damaged")
    assert again == cold
    assert f"left in {cache}" in said


GRAPHS = {"triton.cudagraphs": True}


@pytest.mark.parametrize(
    ("device", "wanted", "changed", "compiled", "options"),
    [
        ("cuda", "auto", {}, "as graphs", GRAPHS),
        ("cuda", "auto", {"dropout": 0.1}, "as graphs", GRAPHS | {"triton.mix_order_reduction": False}),
        ("cuda", "auto", {"micro_batches": 4}, "as graphs", GRAPHS),
        ("cuda", "auto", {"micro_batches": 4, "memory": 15 * 400}, "yes", {}),  # no room for the sums of gradients
        ("cuda", "auto", {"memory": 15 * 400}, "as graphs", GRAPHS),
        ("cuda", "auto", {"flops": LAUNCH_BOUND_FLOPS, "dropout": 0.1}, "yes", {}),
        ("cuda", "auto", {"distributed": DistributedType.MULTI_GPU}, "yes", {}),
        ("cuda", "auto", {"launcher": DynamoBackend.INDUCTOR}, "no", None),
        ("cuda", False, {}, "no", None),
        ("cpu", "auto", {}, "no", None),
        ("cpu", True, {"dropout": 0.1}, "yes", {}),
    ],
)
def test_what_is_compiled_and_how(monkeypatch, device, wanted, changed, compiled, options):
    case = {"flops": 1e9, "micro_batches": 1, "memory": 10**9, "distributed": DistributedType.NO, "dropout": 0.0}
    case |= {"launcher": DynamoBackend.NO, **changed}
    model = nn.Linear(10, 10, bias=False)  # 400 bytes
    model.device = torch.device("cpu")
    model.config = SimpleNamespace(dropout=case["dropout"])
    calls = []
    monkeypatch.setattr(model, "compile", lambda **settings: calls.append(settings))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (0, case["memory"]))
    accelerator = SimpleNamespace(
        device=torch.device(device),
        state=SimpleNamespace(dynamo_plugin=SimpleNamespace(backend=case["launcher"])),
        is_fsdp2=False,
        distributed_type=case["distributed"],
    )
    batch = BatchPlan(case["micro_batches"], 1, case["micro_batches"])
    assert compile_model(model, wanted, accelerator, batch, micro_batch_flops=case["flops"]) == compiled
    assert calls == ([] if options is None else [{"options": options, "dynamic": False}])


def test_the_compiler_knows_its_options():
    from torch._inductor import list_mode_options, list_options

    assert list_mode_options()["reduce-overhead"] == GRAPHS
    assert "triton.mix_order_reduction" in list_options()


def test_every_model_of_a_process_is_compiled(monkeypatch):
    compile_with, compiled = nn.Module.compile, []

    def compile_cheaply(model, **_):
        compile_with(model, backend=lambda graph, _: compiled.append(model) or graph.forward, dynamic=False)

    monkeypatch.setattr(GPT, "compile", compile_cheaply)
    torch.compiler.reset()
    for width in range(8, 8 * 11, 8):
        model = GPT(GPTConfig(block_size=8, vocab_size=64, n_layer=1, n_head=1, n_embd=width))
        compile_model(model, True, Accelerator(cpu=True), BatchPlan(1, 1, 1), micro_batch_flops=1.0)
        model(torch.ones(2, 8, dtype=torch.long))
        assert compiled[-1] is model


class Stumbling(nn.Module):
    """Fails at its first call."""

    def __init__(self, error):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.error, self.modes = error, []

    def forward(self, x, y):
        self.modes.append(self.training)
        if len(self.modes) == 1:
            torch.rand(3)
            raise self.error
        return (self.weight * torch.rand(len(x)) * (x - y)).sum()


BATCH = torch.ones(2), torch.zeros(2)


def test_the_trial_starts_over_and_leaves_no_trace(monkeypatch):
    at_exit = []
    monkeypatch.setattr(compilation, "atexit", SimpleNamespace(register=at_exit.append))
    model, rng, environment = Stumbling(RuntimeError("cut short")), torch.get_rng_state(), dict(os.environ)
    with pytest.warns(UserWarning, match="cut short"):
        warm_up_compiled(Accelerator(cpu=True), model, BATCH, evaluates=True)
    assert model.modes == [True, True, False]
    assert model.training
    assert model.weight.grad is None
    assert torch.equal(torch.get_rng_state(), rng)
    fresh = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert fresh.is_dir()  # as long as this process may compile
    at_exit[0]()
    assert not fresh.exists()
    assert {**os.environ, "TORCHINDUCTOR_CACHE_DIR": ""} == {**environment, "TORCHINDUCTOR_CACHE_DIR": ""}


def test_the_trial_leaves_mpss_generator_alone(monkeypatch):
    states = [torch.tensor([1])]
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: states[-1])
    monkeypatch.setattr(torch.mps, "set_rng_state", states.append)
    with contextlib.suppress(RuntimeError), _rng_forked(torch.device("mps")):
        states.append(torch.tensor([2]))
        raise RuntimeError("cut short")
    assert len(states) == 3
    assert states[-1] is states[0]


def test_what_no_cache_is_to_blame_for_is_not_tried_again():
    model = Stumbling(torch.OutOfMemoryError("too large"))
    with pytest.raises(torch.OutOfMemoryError):
        warm_up_compiled(Accelerator(cpu=True), model, BATCH, evaluates=False)
    assert len(model.modes) == 1
