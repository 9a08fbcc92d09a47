"""Every benchmark runs on a CPU, with the smallest models."""

import importlib
import json
import runpy
from pathlib import Path

import pytest
import torch

from homebrew import GPT, GPTConfig

ROOT = Path(__file__).parents[2]
TEXT = "It is the east, and Juliet is the sun.\n" * 60
NANOGPT = """
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=config.bias)

    def forward(self, ids, targets):
        logits = self.head(self.embedding(ids))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay)
"""
"""A model with nanoGPT's interface."""
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the benchmarks choose larger sizes on a GPU"),
    pytest.mark.filterwarnings("ignore"),  # from other libraries
]


@pytest.fixture
def run(tmp_path):
    """Return a function that runs a script with options and returns its tables as lists of rows."""

    def run_script(name, **options):
        script = importlib.import_module(name)
        report = tmp_path / "report.json"
        script.main(script.Options(json=report, **options))
        return [table["rows"] for table in json.loads(report.read_text())["tables"]]

    return run_script


@pytest.fixture
def nanogpt(tmp_path):
    """Return a folder with a stand-in for nanoGPT."""
    (tmp_path / "nanogpt" / "data" / "shakespeare_char").mkdir(parents=True)
    (tmp_path / "nanogpt" / "model.py").write_text(NANOGPT)
    (tmp_path / "nanogpt" / "train.py").write_text("print('step 2: train loss 4.0, val loss 9.5')")
    return tmp_path / "nanogpt"


TINY = {"tokens": 64, "micro_batch": 2, "block_size": 16, "rounds": 1, "steps": 1}


@pytest.mark.slow
def test_throughput(run, nanogpt):
    (rows,) = run("throughput", models=("baby",), **TINY, nanogpt=nanogpt)
    assert [row["implementation"] for row in rows] == [
        "homebrew Trainer",
        "nanoGPT, bias=True",
        "nanoGPT, bias=False",
        "Hugging Face Trainer",
        "Hugging Face Trainer, vocabulary of 50,257",
    ]
    assert rows[0]["speedup"] == "1.000 ×"


def test_throughput_of_a_bare_loop_and_a_changed_preset(run):
    model = "gpt2:n_layer=1,n_head=1,n_embd=8,vocab_size=65"
    (rows,) = run("throughput", models=(model,), **TINY, only=("homebrew", "bare"))
    assert [row["implementation"] for row in rows] == ["homebrew Trainer", "bare loop"]


def test_throughput_without_nanogpt(run, capsys):
    model = "gpt2:n_layer=1,n_head=1,n_embd=8,vocab_size=65"
    (rows,) = run("throughput", models=(model,), **TINY, nanogpt=Path("missing"), only=("homebrew", "nanogpt", "llmc"))
    assert [row["implementation"] for row in rows] == ["homebrew Trainer"]
    assert "--nanogpt FOLDER" in capsys.readouterr().err


@pytest.mark.parametrize("vocab_size", [65, 1000, 50_257])
def test_padded_vocabulary_of_transformers_is_a_multiple_of_64(vocab_size):
    hf_model = importlib.import_module("implementations").hf_model
    config = GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=vocab_size)
    assert hf_model(config, pad_vocab=False).lm_head.weight.shape[0] == vocab_size
    padded = hf_model(config)
    assert padded.lm_head.weight is padded.transformer.wte.weight
    assert padded.lm_head.weight.shape[0] == -(-vocab_size // 64) * 64
    assert padded.config._attn_implementation == "sdpa"


@pytest.mark.slow
def test_time_to_loss(run, nanogpt, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    shape = {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 8, "batch": 2}
    steps = {"loss": 10.0, "max_steps": 2, "eval_every": 1}
    (runs,) = run("time_to_loss", **shape, **steps, nanogpt=nanogpt, text=tmp_path / "text.txt")
    assert [(row["implementation"], row["at step"]) for row in runs] == [("homebrew", "1"), ("nanoGPT's train.py", "2")]
    assert float(runs[0]["seconds to 10.0"]) > 0


@pytest.mark.slow
def test_first_steps(run, nanogpt):
    options = {"model": "baby", "block_size": 8, "micro_batch": 1, "tokens": 16, "nanogpt": nanogpt}
    (rows,) = run("startup", **options)
    assert [row["compile cache"] for row in rows] == ["cold", "warm"]
    assert rows[0].keys() == {"compile cache", "homebrew Trainer", "nanoGPT", "speedup"}


def test_generation(run):
    (rows,) = run("generation", model="baby", batches=(1,), new_tokens=3, rounds=1)
    assert [row["implementation"] for row in rows] == ["homebrew", "Transformers"]


@pytest.mark.slow
def test_lora(run):
    (rows,) = run("lora", model="baby", block_size=8, micro_batch=1, rounds=1, steps=1)
    assert [row["implementation"] for row in rows] == [
        "homebrew, LoRA",
        "PEFT + Hugging Face Trainer",
        "PEFT + Hugging Face Trainer, reduce-overhead",
        "homebrew, full",
        "Hugging Face Trainer, full",
    ]


def test_profile_step(run):
    before, _, after, kernels = run("profile_step", model="baby", block_size=8, micro_batch=1, steps=1)
    for rows in (before, after):
        assert "matrix products" in [row["category"] for row in rows]
    assert len(kernels) == 15


@pytest.mark.slow
def test_ablation(run):
    sizes = {"block_size": 16, "tokens": 64, "micro_batch": 2, "rounds": 1, "steps": 1}
    (rows,) = run("ablation", **sizes, without=("GELU in matrix products", "compile"))
    names = ["homebrew Trainer", "without GELU in matrix products", "without compile", "without all kernels"]
    assert [row["implementation"] for row in rows] == names


@pytest.mark.slow
def test_ladder(run, monkeypatch):
    monkeypatch.setattr("torch.compile", lambda model, **_: model)  # compilation takes most of a minute
    (rows,) = run("ablation", ladder=True, block_size=8, steps=1)
    assert rows[0]["optimization"] == "float32"
    assert rows[-1]["optimization"] == "fused head and loss"


@pytest.mark.parametrize(
    "names",
    [
        ["flash attention"],
        ["cuDNN attention"],
        ["bfloat16 residual"],
        ["fused head and loss"],
        ["Triton loss kernel"],
        ["GELU in matrix products"],
        ["timed matrix products"],
        ["cuDNN attention", "bfloat16 residual", "fused head and loss", "timed matrix products"],
    ],
    ids=", ".join,
)
def test_model_has_the_same_gradients_without_an_optimization(monkeypatch, names):
    for module in ("linear", "mlp"):  # use the operators of a GPU, which PyTorch computes on a CPU
        monkeypatch.setattr(f"homebrew.model.ops.{module}.is_tunable", lambda *_: True)
    ablation = importlib.import_module("ablation")
    config = GPTConfig(n_layer=1, n_head=2, n_embd=8, block_size=8, vocab_size=70)
    ids = torch.randint(70, (2, 9), generator=torch.Generator().manual_seed(0))
    models = GPT(config), GPT(config)
    models[0](ids[:, :-1], ids[:, 1:]).backward()
    with ablation.switched_off(names):
        models[1](ids[:, :-1], ids[:, 1:]).backward()
    for expected, parameter in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad)


def test_optimizations_are_back_after_they_were_switched_off():
    ablation = importlib.import_module("ablation")
    config = GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=70)
    with ablation.switched_off(ablation.OPTIMIZATIONS) as fields:
        assert fields == {"compile": False}
        assert config.padded_vocab_size == 70
    assert config.padded_vocab_size == 128


def test_unknown_optimization_is_an_error(run):
    with pytest.raises(SystemExit, match="fused tea"):
        run("ablation", without=("fused tea",))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("learning --output new --variants a:foo=1", "no argument 'foo'"),
        ("learning --output new --variants a:optimizer=foo", "optimizer='foo'"),
        ("learning --output new --variants", "no runs in new"),
        ("learning --output file", "file"),
        ("learning --output earlier --variants a", "not a run"),
        ("throughput --models foo", "preset 'foo'"),
        ("throughput --only homebrew foo", "Unknown implementations: foo"),
        ("throughput --json missing/report.json", "missing/report.json"),
        ("generation --model foo", "preset 'foo'"),
        ("generation --model char --rounds 0", "--rounds 0"),
        ("generation --model char --steps 0 --batches 1 --new-tokens 1", "0 timed steps"),
        ("profile_step --model char --block-size 8 --micro-batch 1 --steps 0", "0 timed steps"),
        ("lora --model foo", "preset 'foo'"),
        ("ablation --without foo", "Unknown optimizations: foo"),
        ("startup --rounds 0", "--rounds 0"),
    ],
)
def test_a_mistake_of_the_user_is_an_error_without_traceback(monkeypatch, tmp_path, command, message):
    name, *arguments = command.split()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text(TEXT)
    (tmp_path / "earlier").mkdir()
    (tmp_path / "earlier" / "runs.jsonl").write_text('{"variant": "a", "seed": 1}\n')
    monkeypatch.setattr("sys.argv", [f"{name}.py", *arguments])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "benchmarks" / f"{name}.py"), run_name="__main__")
    assert message in caught.value.code  # which Python prints


def test_the_throughput_of_scaling_is_that_of_all_timed_steps(monkeypatch, tmp_path):
    worker, clock = importlib.import_module("scaling_worker"), iter(range(100))
    monkeypatch.setattr(importlib.import_module("harness").StepTimer, "now", lambda: next(clock))
    task = {"tokens": 64, "micro_batch": 1, "block_size": 16, "warmup": 1, "steps": 4, "folder": str(tmp_path)}
    assert worker.measure(task | {"model": "baby"})["tokens_per_second"] == 64 * 4  # in one second


def measured(tokens_per_second):
    return {"tokens_per_second": tokens_per_second, "peak_bytes": None, "collectives": 0.0, "exposed": None}


@pytest.mark.parametrize(("visible", "devices"), [(None, ["0", "1"]), ("", ["0", "1"]), ("3,5,6", ["3", "5"])])
def test_independent_processes_count_as_the_slowest(monkeypatch, visible, devices):
    scaling, launches = importlib.import_module("scaling"), {}
    monkeypatch.setattr(scaling.os, "environ", {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})

    def launch(options, _strategy, processes, _task, *, device):
        launches[device] = (options.tokens, processes)
        return measured(20.0 if device == devices[0] else 10.0)

    monkeypatch.setattr(scaling, "launch", launch)
    result = scaling.measure(scaling.Options(tokens=64), "none", 2, "baby")
    assert launches == dict.fromkeys(devices, (32, 1))
    assert result["tokens_per_second"] == 2 * 10.0


def test_the_efficiency_of_scaling_is_relative_to_one_process_of_the_same_round():
    scaling, layouts = importlib.import_module("scaling"), [("none", 1), ("none", 2), ("ddp", 2)]
    runs = [
        {"strategy": strategy, "processes": processes, "round": turn, **measured(100.0 * value)}
        for turn, values in enumerate([(1, 2, 1), (2, 4, 2), (1, 2, 1)])
        for (strategy, processes), value in zip(layouts, values, strict=True)
    ]
    assert [scaling.row_of(layout, runs)["efficiency"] for layout in layouts] == ["1.000", "1.000", "0.500"]


def test_a_check_of_scaling_that_cannot_run_is_an_error(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(SystemExit, match="two GPUs"):
        run("scaling", check=True, rounds=0)
