import torch

from homebrew import GPT, GPTConfig, get_tokenizer


def test_weights_that_overflow_in_the_chosen_dtype_are_an_error(tmp_path, invoke_error):
    model = GPT(GPTConfig(block_size=8, vocab_size=256, n_layer=1, n_head=1, n_embd=4))
    with torch.no_grad():
        model.transformer.ln_f.bias[0] = 1e5
    model.save_pretrained(tmp_path, get_tokenizer("bytes"))
    error = invoke_error("sample", tmp_path, "--prompt", "a", "--device", "cpu", "--dtype", "float16")
    assert "transformer.ln_f.bias has values that are too large" in error
