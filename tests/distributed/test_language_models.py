"""Models that are not a GPT on several gloo processes: equal to one process, and resumed."""

import json
from pathlib import Path

import pytest
from language_models import NanoGPT
from safetensors.torch import load_file, load_model
from transformers import AutoModelForCausalLM

WORKER = Path(__file__).parents[1] / "support" / "language_model_worker.py"
TASKS = {
    "llama": {"model": "llama", "frozen": ["model.embed_tokens", "model.layers.0.mlp"]},
    "gpt2": {"model": "gpt2", "config": {"optimizer": "muon", "ema_decay": 0.9}},
    "gpt_neox": {"model": "gpt_neox", "config": {"activation_checkpointing": True}},
    "nanogpt": {"model": "nanogpt", "config": {"gather_limit_bytes": 0}},
    "initialized": {"model": "qwen2", "seeds": [0, 1]},  # every rank has the weights of rank 0
}


@pytest.fixture(scope="module")
def run(forks):
    """Run tasks in forked processes, and return the results of rank 0."""

    def run(folder, layout, tasks):
        folder.mkdir(exist_ok=True)
        tasks = {name: {"output_dir": str(folder / name)} | task for name, task in tasks.items()}
        job = {"sharded": layout == "fsdp2", "tasks": tasks, "result": str(folder / "result.json")}
        num_processes = 1 if layout == "one" else 2
        assert set(forks.run(job, num_processes, ACCELERATE_MIXED_PRECISION="no")) == {0}, forks.log.read_text()
        return json.loads((folder / "result.json").read_text())

    return run


@pytest.fixture(scope="module")
def one(run, tmp_path_factory):
    """The runs on one process: their folder and results."""
    folder = tmp_path_factory.mktemp("one")
    return folder, run(folder, "one", TASKS)


@pytest.mark.parametrize("layout", ["ddp2", "fsdp2"])
def test_two_processes_equal_one_and_resume(run, one, tmp_path, layout):
    folder, expected = one
    results = run(tmp_path / layout, layout, TASKS)
    for name, result in results.items():
        assert result.get("error") is None, name
        assert result["kind"].startswith("FSDP" if layout == "fsdp2" else "DistributedDataParallel")
        assert result["losses"] == pytest.approx(expected[name]["losses"], abs=1e-5), name
        assert result["evaluation"] == pytest.approx(expected[name]["evaluation"], abs=1e-5), name
        weights, ours = (load_file(path / name / "weights.safetensors") for path in (folder, tmp_path / layout))
        assert weights.keys() == ours.keys()
        assert all((weights[key] - ours[key]).abs().max() < 2e-3 for key in weights), name
    resumed = {
        name: task | {"resume": str(tmp_path / layout / name / "checkpoints" / "step-00000005")}
        for name, task in TASKS.items()
    }
    for name, result in run(tmp_path / "resumed", layout, resumed).items():
        assert result["losses"] == results[name]["losses"][5:], name
        weights, ours = (load_file(tmp_path / path / name / "weights.safetensors") for path in (layout, "resumed"))
        assert all(weights[key].equal(ours[key]) for key in weights), name
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / layout / "llama" / "export")
    assert exported.lm_head.weight.equal(
        load_file(tmp_path / layout / "llama" / "weights.safetensors")["lm_head.weight"]
    )
    load_model(NanoGPT(), tmp_path / layout / "nanogpt" / "export" / "model.safetensors")


def test_parameters_without_gradient(run, tmp_path):
    unused = {"model": "mixed"}
    ddp = run(tmp_path / "ddp2", "ddp2", {"refused": unused, "found": unused | {"find_unused": True}})
    assert "without gradient" in ddp["refused"]["error"]
    assert "unused.weight" in ddp["refused"]["error"]
    assert "losses" in ddp["found"]
