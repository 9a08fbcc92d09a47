"""Files that must not contradict each other: versions and links."""

import re
import tomllib
from pathlib import Path

import pytest

import homebrew

ROOT = Path(__file__).parents[1]
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("tool", ["ruff", "mypy"])
def test_tool_version_is_the_same_everywhere(tool):
    pinned = PINS[tool]
    assert f"{tool}=={pinned}" in PROJECT["optional-dependencies"]["test"]
    hooks = re.findall(rf"{tool}==(\S+?)[\]\n]", (ROOT / ".pre-commit-config.yaml").read_text())
    assert set(hooks) <= {pinned}


def test_every_dependency_is_pinned():
    requirements = [
        *PROJECT["dependencies"],
        *(name for names in PROJECT["optional-dependencies"].values() for name in names),
    ]
    names = {re.match(r"[\w-]+", name)[0] for name in requirements} - {"homebrew-gpt"}
    pinned = {name.lower().replace("_", "-") for name in PINS}
    assert {name.lower() for name in names} <= pinned


def test_the_version_is_the_same_everywhere():
    assert PROJECT["dynamic"] == ["version"]  # read from homebrew.__version__
    assert f"\nversion: {homebrew.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)[1] == homebrew.__version__


def anchors(page):
    """Return the anchors of a page's headings, as hosting sites and mkdocs name them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    return {
        re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-")
        for title in re.findall(r"^#+ (.+)$", text, re.M)
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page):
    for target, anchor in re.findall(r"\]\((?!https?://)([^)#\s]*)#?([^)\s]*)\)", page.read_text()):
        linked = page.parent / target if target else page
        assert linked.exists(), f"{page.name} links to {target}"
        if anchor and not anchor.startswith("homebrew."):  # of the generated reference
            assert anchor in anchors(linked), f"{page.name} links to {target}#{anchor}"


def test_nothing_is_installed_from_an_index_by_a_name_that_is_not_there():
    for pattern in ("*.md", "docs/**/*.md", "examples/*", "src/**/*.py", "benchmarks/*.py"):
        for path in filter(Path.is_file, ROOT.glob(pattern)):
            assert not re.search(r"pip install .*homebrew-gpt", path.read_text()), path


def test_paths_in_contributing_exist():
    paths = re.findall(r"`(\w+/[\w/.]*)`", (ROOT / "CONTRIBUTING.md").read_text())
    for path in paths:
        assert (ROOT / path).exists() or (ROOT / "src" / "homebrew" / path).exists(), path
