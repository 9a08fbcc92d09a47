"""The Python examples and `homebrew` commands of each page in docs run, in order, with small models and data."""

import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from doc_examples import small
from language_models import NanoGPT

import homebrew
from homebrew import GPT, GPTConfig, TokenDataset, TrainerConfig, get_tokenizer
from homebrew.cli.main import COMMANDS, main

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
EXAMPLE = re.compile(r"(<!-- not run: .+? -->\n+)?```(python|bash)\n(.*?)```", re.S)
PAGES = [path for path in sorted(DOCS.rglob("*.md")) if EXAMPLE.search(path.read_text())]
CONFIG = GPTConfig(block_size=16, n_layer=1, n_head=1, n_embd=8)
QUESTION = {"ctx": "She opens the door and", "endings": ["walks in.", "flies.", "is blue.", "sings."], "label": 0}


def nanogpt_checkpoint():
    sizes = {"block_size": 16, "vocab_size": 256, "n_layer": 1, "n_head": 1, "n_embd": 8}
    return {"model": GPT(GPTConfig(**sizes)).state_dict(), "model_args": sizes}


def nanogpt_config(*, block_size, vocab_size, **others):
    assert others.keys() == {"n_layer", "n_head", "n_embd"}
    return {"block_size": block_size, "vocab_size": vocab_size}


@pytest.fixture(scope="module")
def tiny_gpt2(tmp_path_factory):
    """A pretrained model with GPT-2's tokenizer, whose files take a second to write."""
    folder = tmp_path_factory.mktemp("pretrained") / "tiny-gpt2"
    GPT(CONFIG).save_pretrained(folder, get_tokenizer("gpt2"))
    return folder


@pytest.fixture
def names(tmp_path, monkeypatch, tiny_gpt2):
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
    Path("other.txt").write_text("Arise, fair sun, and kill the envious moon.\n" * 10)
    Path("hellaswag.jsonl").write_text((json.dumps(QUESTION) + "\n") * 2)
    shutil.copytree(tiny_gpt2, "tiny-gpt2")
    texts = [{"text": "Arise, fair sun, and kill the envious moon. " * 10}] * 4
    return {
        "model": GPT(CONFIG),
        "train": TokenDataset.from_tokens(np.arange(500), 16, vocab_size=512),
        "config": TrainerConfig(output_dir="runs/example", max_steps=2, micro_batch_size=2),
        "dataset": {"train": texts, "validation": texts},
    }


def commands(block):
    lines = (shlex.split(line, comments=True) for line in block.replace("\\\n", " ").splitlines())
    return [line for line in lines if line]


def run_command(line, capsys):
    """Run a command of `homebrew`, `mkdir` or `cp`; of another, check that the files of this repository exist."""
    if line[0] in ("cp", "mkdir"):
        subprocess.run(line, check=True)
    if line[0] == "homebrew":
        assert main(line[1:]) == 0, capsys.readouterr().err
    for word in line:
        if re.match(r"(accelerate_configs|benchmarks|examples|tests)/", word):
            assert (ROOT / word).exists(), word


@pytest.mark.skipif(torch.cuda.is_available(), reason="compiling each example takes a minute")
@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(DOCS).with_suffix("").as_posix())
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from transformers
@pytest.mark.filterwarnings("ignore:The learning rate does not reach its peak")  # with the two steps of the test
def test_examples(page, names, capsys):
    for not_run, language, block in EXAMPLE.findall(page.read_text()):
        if language == "bash":
            with pytest.MonkeyPatch.context() as patch:
                for command in COMMANDS.values() if not_run else ():
                    patch.setattr(command, "run", lambda self: None)  # only parse the options
                for line in commands(small(block)):
                    run_command(line, capsys)
        elif not not_run:
            exec(compile(small(block), page.name, "exec"), names)


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda path: path.relative_to(DOCS).as_posix())
def test_examples_import_from_the_top_level_only(page):
    assert set(re.findall(r"^(?:from|import) (homebrew[\w.]*)", page.read_text(), re.M)) <= {"homebrew"}


def messages():
    """Return all strings in the source; values in f-strings are replaced by "…"."""
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_faq_quotes_real_errors():
    quotes = re.findall(r'^### "(.+)"$', (DOCS / "faq.md").read_text(), re.M)
    assert quotes
    sources = list(messages())
    values = re.compile(
        r"train_dataset|TrainerConfig|IterableDataset|cuda:\d|\[\d\]|'[^']*'(?:, '[^']*')*|\d+|…"
    )  # which vary
    for quote in quotes:
        assert any(all(part in source for part in values.split(quote)) for source in sources), quote


def test_reference_has_every_public_name_once():
    names = [
        name
        for page in (DOCS / "reference").glob("*.md")
        for name in re.findall(r"^::: homebrew\.(\w+)$", page.read_text(), re.M)
    ]
    assert sorted(names) == sorted(homebrew.__all__)
