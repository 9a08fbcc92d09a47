import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend
from torch import nn

from homebrew.model.language_model import module_loss
from homebrew.training.batch_size import BatchPlan
from homebrew.training.compile import LAUNCH_BOUND_FLOPS, compile_model, warm_up_compiled

ROOT = Path(__file__).parents[2]
GRAPHS = {"triton.cudagraphs": True}


class CustomLayer(nn.Linear):
    """A layer whose forward method may do anything, such as skip itself at random."""


def with_custom_layer(*args, **settings):
    model = nn.Linear(*args, **settings)
    model.part = CustomLayer(1, 1)
    return model


def compiled_before(*args, **settings):
    model = nn.Linear(*args, **settings)
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize(
    ("device", "wanted", "changes", "mode", "options"),
    [
        ("cuda", "auto", {}, "cuda_graphs", GRAPHS),
        ("cuda", "auto", {"dropout": 0.1}, "cuda_graphs", GRAPHS | {"triton.mix_order_reduction": False}),
        ("cuda", "auto", {"micro_batches": 4}, "cuda_graphs", GRAPHS),
        ("cuda", "auto", {"micro_batches": 4, "memory": 15 * 400}, "kernels", {}),  # no room to accumulate gradients
        ("cuda", "auto", {"memory": 15 * 400}, "cuda_graphs", GRAPHS),
        ("cuda", "auto", {"flops": LAUNCH_BOUND_FLOPS, "dropout": 0.1}, "kernels", {}),
        ("cuda", "auto", {"distributed": DistributedType.MULTI_GPU}, "kernels", {}),
        ("cuda", "auto", {"max_steps": 100}, "captured", None),
        ("cuda", "auto", {"max_steps": 100, "recomputes": True}, "cuda_graphs", GRAPHS),
        ("cuda", "auto", {"max_steps": 100, "model": CustomLayer}, "cuda_graphs", GRAPHS),
        ("cuda", "auto", {"max_steps": 100, "model": with_custom_layer}, "cuda_graphs", GRAPHS),
        ("cuda", "auto", {"max_steps": 100, "model": compiled_before}, "cuda_graphs", GRAPHS),
        ("cuda", True, {"max_steps": 100, "flops": LAUNCH_BOUND_FLOPS}, "kernels", {}),
        ("cuda", True, {"max_steps": 100}, "cuda_graphs", GRAPHS),
        ("cuda", "auto", {"launcher": DynamoBackend.INDUCTOR}, "none", None),
        ("cuda", "auto", {"graphs": False}, "kernels", {}),  # another model than a GPT
        ("cuda", False, {}, "none", None),
        ("cpu", "auto", {}, "none", None),
        ("cpu", True, {"dropout": 0.1}, "kernels", {}),
    ],
)
def test_compile_mode_and_options(monkeypatch, device, wanted, changes, mode, options):
    case = {"flops": 1e9, "micro_batches": 1, "memory": 10**9, "distributed": DistributedType.NO, "dropout": 0.0}
    case |= {"launcher": DynamoBackend.NO, "graphs": True, "recomputes": False, "max_steps": 10**9}
    case |= {"model": nn.Linear, **changes}
    model = case["model"](10, 10, bias=False)  # 400 bytes
    model.config = SimpleNamespace(dropout=case["dropout"])
    block = nn.Linear(1, 1)  # few of the model's weights
    block.activation_checkpointing = case["recomputes"]
    interface = SimpleNamespace(supports_cuda_graphs=case["graphs"], blocks=lambda: [block])
    monkeypatch.setattr("homebrew.training.compile.interface_of", lambda _: interface)
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
    sizes = {"micro_batch_flops": case["flops"], "max_steps": case["max_steps"]}
    assert compile_model(model, wanted, accelerator, batch, **sizes) == mode
    assert calls == ([] if options is None else [{"options": options, "dynamic": False}])


def test_pytorch_has_the_compiler_options_in_use():
    from torch._inductor import list_mode_options, list_options

    assert list_mode_options()["reduce-overhead"] == GRAPHS
    assert "triton.mix_order_reduction" in list_options()


def test_more_models_are_compiled_than_the_default_limit_allows():
    class Model(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(width, width))

        def forward(self, x):
            return x @ self.weight

        def compile(self, **_):
            super().compile(backend=lambda graph, _: compiled.append(self) or graph.forward, dynamic=False)

    from torch._dynamo import config

    compiled, limit = [], 8
    torch.compiler.reset()
    with config.patch(recompile_limit=limit):
        for width in range(2, 2 + limit + 2):
            model = Model(width)
            compile_model(model, True, Accelerator(cpu=True), BatchPlan(1, 1, 1), micro_batch_flops=1.0, max_steps=1)
            model(torch.ones(2, width))
            assert compiled[-1] is model


class RandomModel(nn.Module):
    """Draws random numbers and counts in each pass, and records its mode."""

    def __init__(self, error=None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.register_buffer("num_calls", torch.zeros(()))
        self.error, self.modes = error, []

    def forward(self, input_ids, targets):
        self.modes.append(self.training)
        self.num_calls += 1
        loss = (self.weight * torch.rand(len(input_ids)) * (input_ids - targets)).sum()
        if self.error is not None:
            raise self.error
        return loss


BATCH = torch.ones(2), torch.zeros(2)


@pytest.mark.parametrize("error", [None, RuntimeError("compiler error")], ids=["passes", "raises"])
def test_warm_up_leaves_no_trace(error):
    model, rng_state = RandomModel(error), torch.get_rng_state()
    if error is None:
        warm_up_compiled(Accelerator(cpu=True), model, BATCH, loss_function=module_loss)
        assert model.modes == [True]
    else:
        with pytest.raises(RuntimeError, match="compiler error"):
            warm_up_compiled(Accelerator(cpu=True), model, BATCH, loss_function=module_loss)
    assert model.training
    assert model.weight.grad is None
    assert model.num_calls == 0
    assert torch.equal(torch.get_rng_state(), rng_state)


_COUNT_CACHED_GRAPHS = """
import sys, torch
from homebrew import GPT, GPTConfig
from homebrew.training.global_settings import configure_compiler

configure_compiler()
model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=10))
for module in ("linear", "mlp"):
    sys.modules[f"homebrew.model.ops.{module}"].is_tunable = lambda *_: True
model.compile(dynamic=False)
ids = torch.zeros(1, 8, dtype=torch.int64)
model(ids, ids).backward()
print(torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_hit"])
"""


@pytest.mark.slow
def test_another_process_finds_the_traced_graphs_of_the_same_operators(tmp_path):
    """Also with the operators of a GPU, in PyTorch instead of cuBLASLt."""
    package = tmp_path / "src" / "homebrew"
    shutil.copytree(ROOT / "src" / "homebrew", package)
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    environment = os.environ | cache | {"PYTHONPATH": str(package.parent)}

    def count_hits():
        command = [sys.executable, "-c", _COUNT_CACHED_GRAPHS]
        process = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return int(process.stdout.split()[-1])

    assert [count_hits(), count_hits()] == [0, 1]
    with (package / "model" / "ops" / "mlp.py").open("a") as file:
        file.write("# another version\n")
    assert count_hits() == 0
