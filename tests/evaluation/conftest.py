"""A small transformers GPT-2 and the same weights loaded in homebrew."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from homebrew import GPT


@pytest.fixture(scope="package")
def hf_model():
    torch.manual_seed(0)
    sizes = {"n_positions": 12, "vocab_size": 256, "n_layer": 2, "n_head": 2, "n_embd": 16}
    return GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.3, bos_token_id=0, eos_token_id=0)).eval()


@pytest.fixture(scope="package")
def model(hf_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf_model")
    hf_model.save_pretrained(folder)
    return GPT.from_pretrained(folder)
