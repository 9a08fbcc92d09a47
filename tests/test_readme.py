"""The README's examples run, in order, on a small text and small models."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from doc_examples import small

from homebrew.cli.main import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", README, re.M | re.S))

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="compiling each example takes a minute")


def code(section: str, language: str) -> str:
    (block,) = re.findall(rf"```{language}\n(.*?)```", SECTIONS[section], re.S)
    return block


@pytest.fixture(autouse=True)
def working_directory(tmp_path, monkeypatch):
    """Change to a folder with the files that the README names."""
    (tmp_path / "book.txt").write_text("It is the east, and Juliet is the sun.\n" * 100)
    (tmp_path / "other.txt").write_text("Arise, fair sun, and kill the envious moon.\n" * 10)
    monkeypatch.chdir(tmp_path)


def test_command_line(capsys):
    lines = [shlex.split(line, comments=True) for line in small(code("Command line", "bash")).splitlines()]
    assert [line[:2] for line in lines] == [
        ["homebrew", command]
        for command in ("doctor", "tokenizer", "prepare", "train", "sample", "eval", "plot", "export")
    ]
    for line in lines:
        assert main(line[1:]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("section", [name for name, text in SECTIONS.items() if "```python" in text])
def test_python(section):
    exec(compile(small(code(section, "python")), f"README, {section}", "exec"), {"__name__": section})


def test_examples_import_from_the_top_level_only():
    assert set(re.findall(r"^(?:from|import) (homebrew[\w.]*)", README, re.M)) == {"homebrew"}


def test_set_up_is_what_ci_runs():
    (install, command) = re.findall(r"^(pip install .*'\.\[test\]') && (pytest)$", README, re.M)[0]
    commands = (ROOT / ".ci" / "run").read_text()
    assert install in commands
    assert re.search(rf"^ *{command}\b", commands, re.M)
