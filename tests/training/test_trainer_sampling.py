"""`Trainer.sample`: text from the model in training."""

import pytest
from tiny_runs import make_trainer

from homebrew import GPT, GPTConfig, Sampling, TokenDataset, generate_text
from homebrew.errors import ConfigError


def make_text_trainer(output_dir, text):
    dataset = TokenDataset.from_text(text, block_size=16, tokenizer="char")
    config = GPTConfig(block_size=16, vocab_size=dataset.vocab_size, n_layer=1, n_head=1, n_embd=16)
    return make_trainer(output_dir, model=config, train_dataset=dataset, max_steps=1)


def test_sample_continues_the_prompt_and_is_reproducible(tmp_path):
    trainer = make_text_trainer(tmp_path, "To be, or not to be: that is the question.\n" * 40)
    trainer.train()
    text = trainer.sample("To be", max_new_tokens=40, seed=1)
    assert text.startswith("To be")
    assert len(text) == 45
    assert text == trainer.sample("To be", max_new_tokens=40, seed=1)
    assert text != trainer.sample("To be", max_new_tokens=40, seed=2)


def test_sampling_settings_are_those_of_generate_text(tmp_path):
    trainer = make_text_trainer(tmp_path, "To be, or not to be: that is the question.\n" * 40)
    sampling = Sampling(temperature=0.7, top_k=5)
    text = trainer.sample("To be", max_new_tokens=40, sampling=sampling, seed=1)
    tokenizer = trainer.train_dataset.tokenizer
    assert text == "To be" + "".join(generate_text(trainer.model, tokenizer, "To be", 40, sampling=sampling, seed=1))
    assert text != trainer.sample("To be", max_new_tokens=40, seed=1)


@pytest.mark.parametrize("text", ["one line\n" * 40, "GATTACA" * 40], ids=["newline", "no newline"])
def test_sample_without_a_prompt_returns_generated_tokens_only(tmp_path, text):
    sample = make_text_trainer(tmp_path, text).sample(max_new_tokens=40)
    assert len(sample) == 40
    assert set(sample) <= set(text)


def test_sample_without_a_tokenizer_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="okenizer"):
        make_trainer(tmp_path).sample("text")


def test_ids_beyond_the_tokenizers_vocabulary_are_not_sampled(tmp_path):
    """Models often have a vocabulary rounded up to a multiple of 64 or 128."""
    dataset = TokenDataset.from_text("To be, or not to be. " * 40, block_size=16, tokenizer="bytes")
    model = GPT(GPTConfig(block_size=16, vocab_size=1000, n_layer=1, n_head=1, n_embd=16))
    trainer = make_trainer(tmp_path, model=model, train_dataset=dataset, max_steps=1)
    for text in ("To be", ""):
        assert trainer.sample(text, max_new_tokens=100, seed=1).startswith(text)
