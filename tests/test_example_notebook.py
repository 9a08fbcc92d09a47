"""`examples/train_shakespeare.ipynb`: its settings, the outputs that are kept in it, and that it runs."""

import base64
import importlib
import re
from pathlib import Path
from types import SimpleNamespace

import nbclient
import nbformat
import pytest

from homebrew import GPTConfig, TrainerConfig

EXAMPLES = Path(__file__).parents[1] / "examples"
PNG = b"\x89PNG\r\n"


@pytest.fixture
def notebook():
    return nbformat.read(EXAMPLES / "train_shakespeare.ipynb", as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook, kind):
    """Return the outputs of all cells that have this MIME type."""
    data = [output.data for cell in code_cells(notebook) for output in cell.outputs if "data" in output]
    return [content[kind] for content in data if kind in content]


def texts(notebook):
    return "".join(output.get("text", "") for cell in code_cells(notebook) for output in cell.outputs)


def test_the_settings_are_those_of_the_script(notebook, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    recipe = importlib.import_module("train_shakespeare").choose_recipe("char", "auto")
    (source,) = [cell.source for cell in code_cells(notebook) if "MAX_STEPS =" in cell.source]
    names = {"Path": Path, "GPTConfig": GPTConfig, "TrainerConfig": TrainerConfig}
    names["dataset"] = SimpleNamespace(vocab_size=recipe.model.vocab_size)
    exec(source, names)
    assert names["model"] == recipe.model
    assert names["config"] == TrainerConfig(
        output_dir=names["RUN"],
        max_steps=recipe.max_steps,
        eval_every=recipe.max_steps // 5,
        optimizer=recipe.optimizer,
        **recipe.settings,
    )


def test_the_outputs_are_those_of_a_whole_run(notebook):
    assert [cell.execution_count for cell in code_cells(notebook)] == list(range(1, len(code_cells(notebook)) + 1))
    interrupted, resumed = outputs(notebook, "text/html")
    assert "resume to continue from step 600" in interrupted
    assert "step 1,800 / 1,800" in resumed
    assert all("<polyline" in html for html in (interrupted, resumed))
    (image,) = outputs(notebook, "image/png")
    assert base64.b64decode(image).startswith(PNG)
    assert "ROMEO:\n" in texts(notebook)
    assert "JULIET:\n" in texts(notebook)
    assert not any(output.output_type == "error" for cell in code_cells(notebook) for output in cell.outputs)


def test_the_outputs_have_no_absolute_paths(notebook):
    plain = "\n".join([texts(notebook), *outputs(notebook, "text/plain")])
    assert not re.search(r"(?<![\w.])/\w+/|[A-Z]:\\", plain)


@pytest.mark.slow
def test_the_notebook_runs(notebook, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("ROMEO:\nTo be, or not to be: that is the question.\nJULIET:\n" * 200)
    for cell in notebook.cells:
        cell.source = cell.source.replace("MAX_STEPS = 1_800", "MAX_STEPS = 30")
        cell.source = cell.source.replace('load_corpus("tinyshakespeare")', 'load_corpus(path="text.txt")')
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=200, kernel_name="python3", resources=resources).execute()
    interrupted, resumed = outputs(notebook, "text/plain")[:2]
    assert "resume to continue from step 10" in interrupted
    assert "resumes at step 10/30" in resumed
    assert "step 30 / 30" in resumed
    assert "ROMEO:\n" in texts(notebook)
    assert outputs(notebook, "image/png")
    assert (tmp_path / "runs" / "shakespeare-exported" / "model.safetensors").exists()
