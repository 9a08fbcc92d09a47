import pytest
import torch

from homebrew import GPT, GPTConfig, get_tokenizer


@pytest.mark.parametrize("command", [["sample", "--prompt", "a"], ["eval", "--text", "text.txt"]])
def test_a_tokenizer_with_more_ids_than_the_model_is_named(tmp_path, invoke_error, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("Now is the winter of our discontent.")
    GPT(GPTConfig(block_size=8, vocab_size=300, n_layer=1, n_head=1, n_embd=4)).save_pretrained(tmp_path)
    error = invoke_error(command[0], tmp_path, *command[1:], "--tokenizer", "gpt2", "--device", "cpu")
    assert "'gpt2' has 50,257 ids" in error
    assert "300" in error


def test_weights_that_overflow_in_the_chosen_dtype_are_an_error(tmp_path, invoke_error):
    model = GPT(GPTConfig(block_size=8, vocab_size=256, n_layer=1, n_head=1, n_embd=4))
    with torch.no_grad():
        model.transformer.ln_f.bias[0] = 1e5
    model.save_pretrained(tmp_path, get_tokenizer("bytes"))
    error = invoke_error("sample", tmp_path, "--prompt", "a", "--device", "cpu", "--dtype", "float16")
    assert "transformer.ln_f.bias has values that are too large" in error
