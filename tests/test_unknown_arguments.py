"""Names of other programs as keyword arguments of configurations, datasets and generation are errors that name ours."""

import inspect
from dataclasses import fields
from functools import partial

import pytest

from homebrew import (
    GPT,
    ArgumentError,
    GPTConfig,
    LoRAConfig,
    Sampling,
    TokenDataset,
    Trainer,
    generate_text,
    get_tokenizer,
)
from homebrew.data import dataset
from homebrew.generation import sampling
from homebrew.model.other_names import CONFIG_NAMES, GENERATE_NAMES, LORA_NAMES

MODEL = GPT(GPTConfig(block_size=16, vocab_size=256, n_layer=1, n_head=1, n_embd=8))
CALLS = [
    (GPTConfig, "n_layers", "n_layer"),
    (GPTConfig, "num_attention_heads", "n_head"),
    (GPTConfig, "max_position_embeddings", "block_size"),
    (GPTConfig, "bias", "biases"),
    (GPT, "n_layer", "GPTConfig"),
    (partial(GPT, GPTConfig()), "inits", "init"),
    (partial(GPTConfig.preset, "char"), "hidden_size", "n_embd"),
    (LoRAConfig, "r", "rank"),
    (LoRAConfig, "lora_alpha", "alpha"),
    (LoRAConfig, "task_type", "leave it out"),
    (Sampling, "do_sample", "temperature=0"),
    (Sampling, "max_new_tokens", "generate"),
    (Sampling, "topk", "top_k"),
    (partial(MODEL.generate, [[1]], 2), "temperature", r"sampling=Sampling\(temperature=...\)"),
    (partial(MODEL.generate, [[1]], 2), "max_length", "max_new_tokens"),
    (partial(generate_text, MODEL, get_tokenizer("bytes"), "a", 2), "top_k", r"sampling=Sampling\(top_k=...\)"),
    (partial(Trainer.sample, None, "a", 2), "temperature", r"sampling=Sampling\(temperature=...\)"),
    (partial(TokenDataset.from_text, "abc"), "blocksize", "block_size"),
    (partial(TokenDataset.from_file, "book.txt"), "max_length", "block_size"),
    (partial(TokenDataset.from_dataset, [], 2), "text_field", "text_column"),
    (partial(TokenDataset.from_tokens, [1, 2, 3]), "seq_len", "block_size"),
    (partial(TokenDataset.from_shards, "tokens"), "tokeniser", "tokenizer"),
]


@pytest.mark.parametrize(("function", "name", "ours"), CALLS)
def test_an_unknown_argument_is_answered_by_the_one_that_was_meant(function, name, ours):
    with pytest.raises(ArgumentError, match=f"has no argument '{name}'. .*{ours}"):
        function(**{name: 1})


@pytest.mark.parametrize(
    ("names", "known"),
    [
        (CONFIG_NAMES, fields(GPTConfig)),
        (LORA_NAMES, fields(LoRAConfig)),
        (sampling._NAMES, fields(Sampling)),
        (GENERATE_NAMES, inspect.signature(GPT.generate).parameters.values()),
        (dataset._NAMES, inspect.signature(TokenDataset.from_dataset).parameters.values()),
    ],
)
def test_suggested_arguments_exist(names, known):
    assert names.other_names.keys() <= {argument.name for argument in known}
