from dataclasses import astuple
from types import SimpleNamespace

import pytest
import torch

from homebrew.errors import ConfigError
from homebrew.model.gpt import GPT
from homebrew.model.gpt_config import GPTConfig


@pytest.mark.parametrize(
    ("name", "block_size", "n_layer", "n_head", "n_embd", "num_parameters"),
    [
        ("char", 64, 2, 4, 128, 6_837_888),
        ("baby", 128, 4, 4, 128, 7_242_624),
        ("gpt2", 1024, 12, 12, 768, 124_439_808),  # from here on, published with the weights of GPT-2
        ("gpt2-medium", 1024, 24, 16, 1024, 354_823_168),
        ("gpt2-large", 1024, 36, 20, 1280, 774_030_080),
        ("gpt2-xl", 1024, 48, 25, 1600, 1_557_611_200),
    ],
)
def test_presets(name, block_size, n_layer, n_head, n_embd, num_parameters):
    config = GPTConfig.preset(name)
    assert astuple(config) == (block_size, 50_257, n_layer, n_head, n_embd, 0.0, None)
    with torch.device("meta"):
        assert GPT(config).num_parameters() == num_parameters


def test_the_defaults_are_those_of_gpt2_small():
    assert astuple(GPTConfig()) == astuple(GPTConfig.preset("gpt2"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layer": 0}, "n_layer=0"),
        ({"vocab_size": -1}, "vocab_size=-1"),
        ({"vocab_size": 2**24 + 1}, "vocab_size=16777217.* 1 to 16,777,216"),
        ({"block_size": 2.5}, "block_size=2.5"),
        ({"n_head": True}, "n_head=True"),
        ({"n_embd": 100, "n_head": 3}, r"n_embd=100 is not a multiple of n_head=3.*99 and 102"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"dropout": -0.1}, "dropout=-0.1"),
        ({"dropout": float("nan")}, "dropout=nan"),
        *(({"dropout": value}, "dropout=") for value in (None, "0.1", False)),
        *(({"vocab_size": 256, "eos_token_id": eos}, "eos_token_id=.*0 to 255") for eos in (-2, 256, True, 7.0, "7")),
    ],
)
def test_invalid_config_is_rejected(changes, message):
    with pytest.raises(ConfigError, match=message):
        GPTConfig(**changes)


def test_unknown_preset_error_lists_the_presets():
    with pytest.raises(ConfigError, match=r"no preset 'gpt3'.*gpt2-xl"):
        GPTConfig.preset("gpt3")


def test_preset_fields_can_be_overridden():
    assert GPTConfig.preset("gpt2-medium", dropout=0.1) == GPTConfig(n_layer=24, n_head=16, n_embd=1024, dropout=0.1)


def test_the_limits_of_each_field_are_valid():
    GPTConfig(block_size=1, vocab_size=1, n_layer=1, n_head=1, n_embd=1, dropout=0, eos_token_id=0)
    GPTConfig(vocab_size=256, dropout=0.999, eos_token_id=255)
    GPTConfig(block_size=2**24, vocab_size=2**24, n_layer=2**24, n_head=2**24, n_embd=2**24)
    GPTConfig(eos_token_id=-1)


def test_configs_that_differ_only_in_the_end_of_text_are_equal():
    assert GPTConfig(eos_token_id=1) == GPTConfig(eos_token_id=2)


@pytest.mark.parametrize(
    ("eos_token_id", "of_tokenizer", "expected"),
    [(None, 7, 7), (None, None, None), (5, 7, 5), (0, 7, 0), (-1, 7, None)],
)
def test_the_models_own_end_of_text_has_precedence(eos_token_id, of_tokenizer, expected):
    config = GPTConfig(eos_token_id=eos_token_id)
    assert config.end_of_text_id(SimpleNamespace(end_of_text_id=of_tokenizer)) == expected
    assert config.end_of_text_id(None) == (None if eos_token_id is None else expected)


@pytest.mark.parametrize(("vocab_size", "padded"), [(1, 128), (127, 128), (128, 128), (129, 256), (50_257, 50_304)])
def test_the_vocabulary_is_padded_to_a_multiple_of_128(vocab_size, padded):
    assert GPTConfig(vocab_size=vocab_size).padded_vocab_size == padded
