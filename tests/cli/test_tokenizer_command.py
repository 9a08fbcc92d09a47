"""A tokenizer of the user's own, from `homebrew tokenizer train` to transformers."""

import json
import re
import shlex

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from homebrew import get_tokenizer, load_model
from homebrew.data.token_file import TokenFile


@pytest.fixture
def own(text, tmp_path, invoke):
    """Path of a tokenizer trained on the text."""
    invoke("tokenizer", "train", text, "--vocab-size", 280, "--output", tmp_path / "own.json")
    return tmp_path / "own.json"


def test_the_printed_command_tokenizes_the_text(text, tmp_path, invoke, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = invoke("tokenizer", "train", text, "--vocab-size", 280, "--output", "my own")
    assert "280 tokens" in output
    assert (tmp_path / "my own" / "tokenizer.json").is_file()
    invoke(*shlex.split(re.search(r"homebrew (prepare .*)", output)[1]))
    (tokens,) = tmp_path.glob("*.npy")
    assert TokenFile(tokens).metadata.vocab_size == 280


def test_options_may_come_before_the_texts(text, tmp_path, invoke):
    invoke("tokenizer", "train", "--output", tmp_path / "a.json", "--vocab-size", 260, text)
    assert get_tokenizer(tmp_path / "a.json").vocab_size == 260


@pytest.mark.parametrize("prepared", [False, True])
def test_a_run_is_trained_resumed_exported_and_opened_by_transformers(
    own, text, tmp_path, invoke, tiny, prepared, monkeypatch
):
    tokenizer, run, exported = get_tokenizer(own), tmp_path / "run", tmp_path / "exported"
    monkeypatch.chdir(tmp_path)
    data, options = text.name, ["--tokenizer", own.name]
    if prepared:
        invoke("prepare", text.name, "--tokenizer", own.name, "--output", "tokens.npy")
        data, options = "tokens.npy", []
    invoke("train", data, *options, "--output-dir", run, "--max-steps", 2, *tiny)
    monkeypatch.chdir("/")
    invoke("train", "--resume", "--output-dir", run, "--max-steps", 3, "--accept-changes", "schedule")
    own.rename(tmp_path / "moved.json")  # a finished run contains its tokenizer
    assert load_model(run)[1].to_json() == tokenizer.to_json()
    sample = ["--prompt", "JULIET is", "--max-new-tokens", 8, "--temperature", 0]
    generated = invoke("sample", run, *sample)
    assert "bits per byte" in invoke("eval", run, "--text", text)

    invoke("export", run, exported)
    assert load_model(exported)[1].to_json() == tokenizer.to_json()
    assert get_tokenizer(exported).to_json() == tokenizer.to_json()
    assert invoke("sample", exported, *sample) == generated
    theirs, model = AutoTokenizer.from_pretrained(exported), AutoModelForCausalLM.from_pretrained(exported)
    for string in ("JULIET is the sun.\n\n  Grüße 中文 \u00a0 123", "<|endoftext|>"):
        ids = tokenizer.encode(string).tolist()
        assert theirs.encode(string, split_special_tokens=True) == ids
        assert theirs.decode(ids) == tokenizer.decode(ids) == string
    assert theirs.eos_token_id == model.config.eos_token_id == tokenizer.end_of_text_id
    ids = torch.from_numpy(tokenizer.encode("JULIET is the sun."))[None]
    assert torch.allclose(model(ids).logits, load_model(run)[0](ids), atol=1e-5)


def test_an_export_saved_again_by_transformers_keeps_its_tokenizer(own, text, tmp_path, invoke, tiny):
    invoke("train", text, "--tokenizer", own, "--output-dir", tmp_path / "run", "--max-steps", 1, *tiny)
    invoke("export", tmp_path / "run", tmp_path / "a")
    AutoModelForCausalLM.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    AutoTokenizer.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    assert load_model(tmp_path / "b")[1].to_json() == get_tokenizer(own).to_json()


def test_a_tokenizer_can_be_given_for_a_model_without_one(own, text, tmp_path, invoke, invoke_error, tiny):
    invoke("train", text, "--tokenizer", own, "--output-dir", tmp_path / "run", "--max-steps", 1, *tiny)
    invoke("export", tmp_path / "run", tmp_path / "bare", "--no-tokenizer")
    sample = ["--prompt", "JULIET", "--max-new-tokens", 4, "--temperature", 0]
    assert "tokenizer.json" in invoke_error("sample", tmp_path / "bare", *sample)
    expected = invoke("sample", tmp_path / "run", *sample, "--tokenizer", own)
    assert invoke("sample", tmp_path / "bare", *sample, "--tokenizer", own) == expected


def test_another_tokenizer_than_that_of_the_data_or_the_model_is_an_error(
    own, text, tmp_path, invoke, invoke_error, tiny
):
    other, tokens = tmp_path / "other.json", tmp_path / "a.npy"
    invoke("tokenizer", "train", text, "--vocab-size", 270, "--output", other)
    invoke("prepare", text, "--tokenizer", own, "--output", tokens)
    train = ["train", tokens, "--output-dir", tmp_path / "run", "--max-steps", 1, *tiny]
    assert "'bpe' was given" in invoke_error(*train, "--tokenizer", other)
    invoke(*train, "--tokenizer", own)
    for command in (["sample", tmp_path / "run", "--prompt", "a"], ["eval", tmp_path / "run", "--text", text]):
        assert "'bpe'" in invoke_error(*command, "--tokenizer", other)
    init = ["train", text, "--init-from", tmp_path / "run", "--output-dir", tmp_path / "b", "--max-steps", 1]
    assert "'bpe'" in invoke_error(*init, "--tokenizer", other)
    invoke(*init, "--eval-fraction", 0)
    assert load_model(tmp_path / "b")[1].to_json() == get_tokenizer(own).to_json()


def test_nanogpts_character_data_needs_the_text(text, tmp_path, invoke_error):
    (tmp_path / "meta.pkl").write_bytes(b"\x80\x04N.")
    for command in (
        ["prepare", text, "--output", tmp_path / "a.npy"],
        ["train", text, "--output-dir", tmp_path / "run", "--max-steps", 1],
    ):
        assert "input.txt" in invoke_error(*command, "--tokenizer", tmp_path / "meta.pkl")


@pytest.mark.parametrize("command", ["prepare", "train", "sample", "eval"])
def test_an_unusable_tokenizer_is_named(command, text, run, tmp_path, invoke, invoke_error):
    invoke("export", run, tmp_path / "bare", "--no-tokenizer")
    arguments = {
        "prepare": [text, "--output", tmp_path / "a.npy"],
        "train": [text, "--output-dir", tmp_path / "run", "--max-steps", 1],
        "sample": [tmp_path / "bare", "--prompt", "a"],
        "eval": [tmp_path / "bare", "--text", text],
    }[command]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    for name in ("gtp2", tmp_path / "config.json", tmp_path / "missing.json"):
        assert str(name) in invoke_error(command, *arguments, "--tokenizer", name)


def test_the_name_of_a_models_tokenizer_may_be_given(text, tmp_path, invoke, tiny):
    invoke("train", text, "--tokenizer", "char", "--output-dir", tmp_path / "run", "--max-steps", 1, *tiny)
    invoke("sample", tmp_path / "run", "--prompt", "a", "--max-new-tokens", 1, "--tokenizer", "char")
