import re
import shlex

import pytest

from homebrew import load_model


def test_export_without_tokenizer(run, invoke, invoke_error, tmp_path):
    invoke("export", run, tmp_path, "--no-tokenizer")
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    greedy = ["--prompt", "Hello", "--temperature", 0, "--max-new-tokens", 10]
    assert "pass --tokenizer" in invoke_error("sample", tmp_path, *greedy)
    assert invoke("sample", tmp_path, *greedy, "--tokenizer", "bytes") == invoke("sample", run, *greedy)


def test_an_export_that_keeps_an_earlier_tokenizer_does_not_ask_for_one(run, invoke, tmp_path):
    invoke("export", run, tmp_path)
    assert "--tokenizer" not in invoke("export", run, tmp_path, "--no-tokenizer")


def test_a_model_without_adapter_has_none_to_export(run, invoke_error, tmp_path):
    assert "Remove --adapter" in invoke_error("export", run, tmp_path / "adapter", "--adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.fixture
def bare_base(run, tmp_path):
    """Folder of a model without a tokenizer."""
    model, _ = load_model(run)
    model.save_pretrained(tmp_path / "bare base")
    return tmp_path / "bare base"


def commands_in(output):
    """Return the words of each `homebrew sample` command in an output."""
    return [shlex.split(line, comments=True)[1:] for line in re.findall(r"homebrew sample .*?(?=  \(|$)", output, re.M)]


@pytest.mark.parametrize("options", [["--adapter"], ["--adapter", "--no-tokenizer"], ["--no-tokenizer"]])
def test_the_printed_command_runs(bare_base, text, tmp_path, invoke, options, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train = ["train", text, "--output-dir", "a run", "--max-steps", 1, "--micro-batch-size", 8, "--tokenizer", "bytes"]
    outputs = [
        invoke(*train, "--init-from", bare_base.name, "--lora-rank", 2),
        invoke("export", "a run", "my export", *options),
    ]
    for output in outputs:
        (command,) = commands_in(output)
        # Which tokenizer a model without one was trained with is not known.
        words = ["bytes" if word == "gpt2" else word for word in command]
        assert invoke(*words, "--prompt", "a", "--max-new-tokens", 2, "--top-k", 0).startswith("a")


def test_an_exported_adapter_is_found_with_its_base_and_tokenizer_from_anywhere(
    bare_base, text, tmp_path, invoke, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    train = ["train", text, "--output-dir", "run", "--max-steps", 1, "--micro-batch-size", 8, "--tokenizer", "bytes"]
    invoke(*train, "--init-from", bare_base.name, "--lora-rank", 2)
    invoke("export", "run", "adapter", "--adapter")
    monkeypatch.chdir(tmp_path.parent)
    greedy = ["--prompt", "Hello", "--temperature", 0, "--max-new-tokens", 10]
    assert invoke("sample", tmp_path / "adapter", *greedy) == invoke("sample", tmp_path / "run", *greedy)
