"""Fixtures of the hub tests."""

from pathlib import Path

import pytest

from homebrew import GPT, GPTConfig, get_tokenizer


@pytest.fixture(scope="session")
def gpt2_export(tmp_path_factory) -> Path:
    """Folder with an export of a small model and GPT-2's tokenizer. Copy it before changing it."""
    folder = tmp_path_factory.mktemp("gpt2-export")
    GPT(GPTConfig(block_size=16, n_layer=1, n_head=2, n_embd=8)).save_pretrained(folder, get_tokenizer("gpt2"))
    return folder
