"""Every benchmark runs on a CPU, with the smallest models."""

import importlib
import json
from pathlib import Path

import pytest
import torch

from homebrew import GPT, GPTConfig

ROOT = Path(__file__).parents[2]
TEXT = "It is the east, and Juliet is the sun.\n" * 60
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the benchmarks choose larger sizes on a GPU"),
    pytest.mark.filterwarnings("ignore"),  # from other libraries
]


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Return a function that runs a script with options and returns its tables as lists of rows."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")

    def run_script(name, **options):
        script = importlib.import_module(name)
        report = tmp_path / "report.json"
        script.main(script.Options(json=report, **options))
        return [table["rows"] for table in json.loads(report.read_text())["tables"]]

    return run_script


@pytest.mark.slow
def test_throughput(run):
    options = {"models": ("baby",), "tokens": 64, "micro_batch": 2, "block_size": 16, "rounds": 1, "steps": 1}
    (rows,) = run("throughput", **options)
    assert [row["implementation"] for row in rows] == [
        "homebrew Trainer",
        "nanoGPT (rewritten), bias=True",
        "Hugging Face Trainer",
        "Hugging Face Trainer, vocabulary of 50,257",
        "original notebook",
    ]
    assert rows[0]["speedup"] == "1.000 ×"


@pytest.mark.parametrize("vocab_size", [65, 1000, 50_257])
def test_padded_vocabulary_of_transformers_is_a_multiple_of_64(monkeypatch, vocab_size):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    hf_model = importlib.import_module("implementations").hf_model
    config = GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=vocab_size)
    assert hf_model(config, pad_vocab=False).lm_head.weight.shape[0] == vocab_size
    padded = hf_model(config)
    assert padded.lm_head.weight is padded.transformer.wte.weight
    assert padded.lm_head.weight.shape[0] == -(-vocab_size // 64) * 64
    assert padded.config._attn_implementation == "sdpa"


def test_overhead(run):
    (rows,) = run("overhead", cases=("tiny",), rounds=1, steps=1)
    assert [row["implementation"] for row in rows] == ["homebrew Trainer", "bare loop"]


@pytest.mark.slow
def test_small_model(run, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    shape = {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 8, "batch": 2}
    steps, runs = run(
        "small_model",
        **shape,
        rounds=1,
        steps=2,
        to_loss=10.0,
        text=tmp_path / "text.txt",
        max_steps=2,
        eval_every=1,
        stride=8,
    )
    assert [row["implementation"] for row in steps] == ["homebrew Trainer", "nanoGPT (rewritten)"]
    assert runs[0]["at step"] == "1"
    assert float(runs[0]["seconds to 10.0"]) > 0


@pytest.mark.slow
def test_memory(run):
    (rows,) = run("memory", model="baby", block_size=16, micro_batch=1, implementations=("homebrew", "nanoGPT"))
    assert [row["implementation"] for row in rows] == ["homebrew", "nanoGPT"]


def test_largest_micro_batch_is_accurate_to_a_sixteenth(run, monkeypatch):
    memory = importlib.import_module("memory")
    for limit in (0, 1, 7, 60, 100, 256, 300):
        tried = []

        def probe(_options, _implementation, size, _cap, limit=limit, tried=tried):
            tried.append(size)
            return f"{2 + 22 * size / limit:.2f}" if size <= limit else None  # 24 GiB at the limit

        monkeypatch.setattr(memory, "probe_in_subprocess", probe)
        peaks = {64: 2 + 22 * 64 / limit} if limit else {}
        largest = memory.largest_micro_batch(memory.Options(), "homebrew", peaks)
        assert min(limit, 256) * 15 / 16 <= largest <= min(limit, 256)
        assert len(tried) <= 5  # each takes a minute to compile


def test_loss(run):
    (rows,) = run("loss", tokens=(8,), widths=(4,), vocab_size=20, dtypes=("float32",), repeats=1)
    assert [row["head and loss"] for row in rows] == ["fused", "plain"]


@pytest.mark.slow
def test_cpu(run):
    (rows,) = run("cpu", models=("shakespeare_char",), rounds=1, steps=1)
    assert [row["implementation"] for row in rows] == ["homebrew", "nanoGPT (rewritten)", "bare loop, float32"]


@pytest.mark.slow
def test_imports(run):
    (rows,) = run("startup", runs=1, model="")
    assert [row["relative to torch, accelerate"] for row in rows][-1] == "1.000 ×"


@pytest.mark.slow
def test_first_steps(run):
    options = {"runs": 0, "model": "baby", "block_size": 8, "micro_batch": 1}
    (rows,) = run("startup", **options)
    assert [row["compile cache"] for row in rows] == ["cold", "warm", "warm again"]


def test_generation(run):
    (rows,) = run("generation", model="baby", batches=(1,), prompt=2, new_tokens=3, rounds=1)
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


def test_fast_and_plain_path_have_equal_losses(run, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    options = {"block_size": 8, "batch": 1, "steps": 4, "points": 2, "seeds": 2, "tokenizer": "bytes"}
    (rows,) = run("numerics", **options, text=tmp_path / "text.txt")
    assert [row["steps"] for row in rows] == ["1–2", "3–4"]
    assert all(float(row["largest |fast − plain|"]) < 0.01 for row in rows)


def test_profile_step(run, capsys):
    run("profile_step", model="baby", block_size=8, micro_batch=1, steps=1, top=2)
    output = capsys.readouterr().out
    assert "### before" in output
    assert "### after" in output
    assert "| matrix products |" in output


def test_saving(run):
    (rows,) = run("saving", block_size=8, tokens=16, every=2, saves=2)
    assert [row["steps"] for row in rows] == ["with a checkpoint", "without"]


@pytest.mark.slow
def test_prepare(run):
    (rows,) = run("prepare", megabytes=0.1, workers=2)
    assert [row["implementation"] for row in rows] == ["homebrew", "nanoGPT's way: tiktoken in datasets.map"]


@pytest.mark.slow
def test_ablation(run):
    sizes = {"block_size": 16, "tokens": 64, "micro_batch": 2, "rounds": 1, "steps": 1}
    (rows,) = run("ablation", **sizes, without=("fused MLP", "compile"))
    names = ["homebrew Trainer", "without fused MLP", "without compile", "without all kernels"]
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
        ["fused MLP"],
        ["Triton GELU kernels"],
        ["cuDNN attention", "bfloat16 residual", "fused head and loss", "fused MLP"],
    ],
    ids=", ".join,
)
def test_model_has_the_same_gradients_without_an_optimization(monkeypatch, names):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    ablation = importlib.import_module("ablation")
    config = GPTConfig(n_layer=1, n_head=2, n_embd=8, block_size=8, vocab_size=70)
    ids = torch.randint(70, (2, 9), generator=torch.Generator().manual_seed(0))
    models = GPT(config), GPT(config)
    models[0](ids[:, :-1], ids[:, 1:]).backward()
    with ablation.switched_off(names):
        if "Triton GELU kernels" in names:  # what replaces them does not need a GPU
            monkeypatch.setattr("homebrew.model.ops.mlp.uses_triton", lambda _: True)
        models[1](ids[:, :-1], ids[:, 1:]).backward()
    for expected, parameter in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad)


def test_optimizations_are_back_after_they_were_switched_off(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    ablation = importlib.import_module("ablation")
    config = GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=70)
    with ablation.switched_off(ablation.OPTIMIZATIONS) as fields:
        assert fields == {"compile": False}
        assert config.padded_vocab_size == 70
    assert config.padded_vocab_size == 128


def test_unknown_optimization_is_an_error(run):
    with pytest.raises(SystemExit, match="fused tea"):
        run("ablation", without=("fused tea",))
