"""Every benchmark in its CPU form, as small as it gets."""

import importlib
import json
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
TEXT = "It is the east, and Juliet is the sun.\n" * 60
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="small on a CPU only"),
    pytest.mark.filterwarnings("ignore"),  # of other libraries
]


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs a script with options; gives its tables as lists of rows."""
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
    assert [row["side"] for row in rows] == [
        "homebrew Trainer",
        "nanoGPT (rewritten), bias=True",
        "Hugging Face Trainer",
        "the seed's loop",
    ]
    assert rows[0]["ours is"] == "1.000 ×"


def test_overhead(run):
    (rows,) = run("overhead", cases=("tiny",), rounds=1, steps=1)
    assert [row["side"] for row in rows] == ["homebrew Trainer", "bare loop"]


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
    assert [row["side"] for row in steps] == ["homebrew Trainer", "nanoGPT (rewritten)"]
    assert runs[0]["at step"] == "1"
    assert float(runs[0]["seconds to 10.0"]) > 0


@pytest.mark.slow
def test_memory(run):
    (rows,) = run("memory", model="baby", block_size=16, micro_batch=1, sides=("homebrew", "nanoGPT"))
    assert [row["side"] for row in rows] == ["homebrew", "nanoGPT"]


def test_the_largest_micro_batch_is_found_within_a_sixteenth(run, monkeypatch):
    memory = importlib.import_module("memory")
    for limit in (0, 1, 7, 60, 100, 256, 300):
        asked = []

        def ask(_options, _side, size, _cap, limit=limit, asked=asked):
            asked.append(size)
            return f"{2 + 22 * size / limit:.2f}" if size <= limit else None  # 24 GiB at the limit

        monkeypatch.setattr(memory, "ask", ask)
        known = {64: 2 + 22 * 64 / limit} if limit else {}  # without a cap
        found = memory.largest(memory.Options(), "homebrew", known)
        assert min(limit, 256) * 15 / 16 <= found <= min(limit, 256)
        assert len(asked) <= 5  # each is a minute's compilation


def test_loss(run):
    (rows,) = run("loss", tokens=(8,), widths=(4,), vocab_size=20, dtypes=("float32",), repeats=1)
    assert [row["head and loss"] for row in rows] == ["fused", "plain"]


def test_cpu(run):
    (rows,) = run("cpu", models=("shakespeare_char",), rounds=1, steps=1)
    assert [row["side"] for row in rows] == ["homebrew", "nanoGPT (rewritten)", "bare loop, float32"]


def test_startup(run):
    (rows,) = run("startup", runs=1, model="")
    assert [row["of torch, accelerate"] for row in rows][-1] == "1.000 ×"


@pytest.mark.slow
def test_first_steps(run):
    options = {"runs": 0, "model": "baby", "block_size": 8, "micro_batch": 1}
    (rows,) = run("startup", **options)
    assert [row["compile cache"] for row in rows] == ["cold", "warm", "warm again", "damaged"]


def test_generation(run):
    (rows,) = run("generation", model="baby", batches=(1,), prompt=2, new_tokens=3, rounds=1)
    assert [row["side"] for row in rows] == ["homebrew", "transformers"]


@pytest.mark.slow
def test_lora(run):
    (rows,) = run("lora", model="baby", block_size=8, micro_batch=1, rounds=1, steps=1)
    assert len(rows) == 4


def test_the_plain_path_is_the_same_function(run, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    options = {"block_size": 8, "batch": 1, "steps": 4, "points": 2, "seeds": 2, "tokenizer": "bytes"}
    (rows,) = run("numerics", **options, text=tmp_path / "text.txt")
    assert [row["steps"] for row in rows] == ["1–2", "3–4"]
    assert all(float(row["largest |fast − plain|"]) < 0.01 for row in rows)


def test_profile(run, capsys):
    run("profile_step", model="baby", block_size=8, micro_batch=1, steps=1, top=2)
    said = capsys.readouterr().out
    assert "### before" in said
    assert "### after" in said
    assert "| matrix products |" in said


def test_saving(run):
    (rows,) = run("saving", block_size=8, tokens=16, every=2, saves=2)
    assert [row["steps in which"] for row in rows] == ["a checkpoint is taken", "the others"]
