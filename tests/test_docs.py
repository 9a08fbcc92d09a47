"""The Python examples of each page in docs run, in order, with small models and data."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from doc_examples import small
from language_models import NanoGPT

from homebrew import GPT, GPTConfig, TokenDataset, TrainerConfig

PAGES = [path for path in sorted((Path(__file__).parents[1] / "docs").glob("*.md")) if "```python" in path.read_text()]
CONFIG = GPTConfig(block_size=16, n_layer=1, n_head=1, n_embd=8)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="compiling each example takes a minute")


def nanogpt_checkpoint():
    sizes = {"block_size": 16, "vocab_size": 256, "n_layer": 1, "n_head": 1, "n_embd": 8}
    return {"model": GPT(GPTConfig(**sizes)).state_dict(), "model_args": sizes}


def nanogpt_config(*, block_size, vocab_size, **others):
    assert others.keys() == {"n_layer", "n_head", "n_embd"}
    return {"block_size": block_size, "vocab_size": vocab_size}


@pytest.fixture
def names(tmp_path, monkeypatch):
    """Change to a folder with the files that the pages name, and return the variables that they do not define."""
    monkeypatch.chdir(tmp_path)
    tokens = Path("data/openwebtext")
    tokens.mkdir(parents=True)
    for name in ("train", "val"):
        np.arange(200, dtype=np.uint16).tofile(tokens / f"{name}.bin")
    Path("out").mkdir()
    torch.save(nanogpt_checkpoint(), "out/ckpt.pt")
    nanogpt = SimpleNamespace(
        GPT=lambda config: NanoGPT(**config), GPTConfig=nanogpt_config
    )  # model.py in its repository
    monkeypatch.setitem(sys.modules, "model", nanogpt)
    Path("book.txt").write_text("It is the east, and Juliet is the sun.\n" * 100)
    GPT(CONFIG).save_pretrained("tiny-gpt2")
    texts = [{"text": "Arise, fair sun, and kill the envious moon. " * 10}] * 4
    return {
        "model": GPT(CONFIG),
        "train": TokenDataset.from_tokens(np.arange(500), 16, vocab_size=512),
        "config": TrainerConfig(output_dir="runs/example", max_steps=2, micro_batch_size=2),
        "dataset": {"train": texts, "validation": texts},
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_python(page, names):
    for example in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
        exec(compile(small(example), page.name, "exec"), names)
