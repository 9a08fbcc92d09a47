"""What the project says of itself, where a file could come to contradict another."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_set_up_is_two_commands():
    commands = re.findall(r"^pip install .*$", (ROOT / "README.md").read_text(), re.M)
    assert commands == [
        "pip install -c constraints.txt -e '.[offline]' && accelerate launch examples/train_shakespeare.py",
        "pip install -c constraints.txt -e '.[test]' && pytest",
    ]


@pytest.mark.parametrize("tool", ["ruff", "mypy"])
def test_one_version_of_a_tool_everywhere(tool):
    pinned = PINS[tool]
    assert f"{tool}=={pinned}" in PROJECT["optional-dependencies"]["test"]
    hooks = re.findall(rf"{tool}==(\S+?)[\]\n]", (ROOT / ".pre-commit-config.yaml").read_text())
    assert set(hooks) <= {pinned}


def test_every_dependency_is_pinned():
    wanted = [
        *PROJECT["dependencies"],
        *(name for names in PROJECT["optional-dependencies"].values() for name in names),
    ]
    names = {re.match(r"[\w-]+", name)[0] for name in wanted} - {"homebrew-gpt"}
    pinned = {name.lower().replace("_", "-") for name in PINS}
    assert {name.lower() for name in names} <= pinned


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(((?!https?://|#)[^)#]+)", (ROOT / page).read_text()):
        assert (ROOT / page).parent.joinpath(target).exists(), f"{page} links to {target}"


def test_every_test_that_reliability_names_exists():
    page = (ROOT / "docs" / "reliability.md").read_text()
    written = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for name in re.findall(r"::(test_\w+)", page):
        assert f"def {name}(" in written, name


def test_examples_are_short():
    for name in ("train_shakespeare.py", "finetune_lora.py", "notebook.py"):
        assert len((ROOT / "examples" / name).read_text().splitlines()) < 60
