"""The display in a notebook: its content, and its messages from a real kernel, also from forked processes."""

import asyncio
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from types import SimpleNamespace

import nbclient
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from rich.console import Console
from worlds import ON_CPUS, free_port

from homebrew import EvalMetrics, GPTConfig, ProgressDisplay, StepMetrics, TokenDataset, Trainer, TrainerConfig
from homebrew.callbacks import notebook_display
from homebrew.callbacks.curve_svg import draw_curves
from homebrew.callbacks.notebook_display import NotebookDisplay
from homebrew.callbacks.progress import format_metrics

METRICS = StepMetrics(
    step=30, loss=2.5, learning_rate=3e-4, grad_norm=0.5, tokens_per_second=1000.0, mfu=None, memory_bytes=None,
    num_tokens=3000, elapsed_seconds=3.0,
)  # fmt: skip
EVALUATION = EvalMetrics.from_loss(step=30, loss=2.25, num_tokens=100, bytes_per_token=1.0)


@pytest.fixture
def shown(monkeypatch):
    """The contents of the output, the first one and each update."""
    shown = []
    handle = SimpleNamespace(
        display=lambda content, raw: shown.append(content), update=lambda content, raw: shown.append(content)
    )
    monkeypatch.setattr("IPython.display.DisplayHandle", lambda: handle)
    return shown


def log(display, step, **changes):
    metrics = replace(METRICS, step=step, **changes)
    display.on_log(metrics, format_metrics(metrics, 100))


def test_the_last_content_has_everything(shown):
    display = NotebookDisplay("a run & its <model>", "first step…", 0, 100)
    assert "first step…" in shown[0]["text/html"]
    for step in range(1, 31):
        display.on_step(step)
        log(display, step, loss=100.0 / step)
    display.on_evaluate(EVALUATION, "step 30 | validation loss 2.25")
    display.print("saving <a folder>")
    display.stop()
    display.print("the end")
    html, text = shown[-1]["text/html"], shown[-1]["text/plain"]
    root = ET.fromstring(html)
    assert root.find(".//progress").attrib.items() >= {("value", "30"), ("max", "100")}
    assert [row[0].text for row in root.findall(".//tbody/tr")] == [str(step) for step in range(26, 31)]
    training, validation = root.findall(".//{*}polyline")
    assert len(training.get("points").split()) == 30
    assert len(validation.get("points").split()) == 1
    for content in ("".join(root.itertext()), text):
        for words in ("a run & its <model>", "validation loss 2.25", "saving <a folder>", "the end"):
            assert words in content
    assert not re.search("<script|<style|class=|https?://(?!www.w3.org/2000/svg)", html)


def test_updates_are_throttled(shown, monkeypatch):
    now = 0.0
    monkeypatch.setattr(notebook_display.time, "monotonic", lambda: now)
    display = NotebookDisplay("summary", "", 0, 100)
    for step in range(1, 101):
        now = step / 20
        display.on_step(step)
    assert 9 <= len(shown) <= 11


def test_a_long_run_is_one_output_of_bounded_size(shown):
    display = NotebookDisplay("summary", "", 0, 100_000)
    for step in range(1, 100_001, 10):
        log(display, step, loss=100.0 if step == 1 else 1.0)
        display.print("x" * 80)
    display.stop()
    assert len(shown[-1]["text/html"]) < 20_000
    points = ET.fromstring(shown[-1]["text/html"]).find(".//{*}polyline").get("points").split()
    heights = [float(point.split(",")[1]) for point in points]
    assert heights[0] < 50  # the first step is kept
    assert min(heights[1:]) > 150
    assert "step 99,991 | loss 1.0" in shown[-1]["text/plain"]


@pytest.mark.parametrize(
    ("first", "last"), [(4.2, 1.5), (1.0, 1.0), (0.0, 0.0), (3.0, 0.0), (1e-9, 2e-9), (1e30, 1e30), (-5.0, 1e12)]
)
def test_curves_stay_in_their_frame(first, last):
    root = ET.fromstring(draw_curves([(1, first), (2, (first + last) / 2), (3, last)], [(3, last)]))
    _, _, width, height = map(float, root.get("viewBox").split())
    for line in root.findall("{*}polyline"):
        for x, y in (map(float, point.split(",")) for point in line.get("points").split()):
            assert 0 <= x <= width
            assert 0 <= y <= height
    labels = [text.text for text in root.findall("{*}text")]
    assert {"1", "2", "3", "training loss", "validation loss"} <= set(labels)
    levels = {text.text for text in root.findall("{*}text") if text.get("text-anchor") == "end"} - {"step"}
    assert 3 <= len(levels) <= 8


@pytest.mark.parametrize("losses", [[], [2.0], [float("nan"), float("inf"), 2.0]])
def test_one_point_is_no_curve(shown, losses):
    display = NotebookDisplay("summary", "", 0, 100)
    for step, loss in enumerate(losses, start=1):
        log(display, step, loss=loss)
    display.stop()
    assert "<svg" not in shown[-1]["text/html"]


def test_a_finished_run_says_so(shown, tmp_path):
    data = TokenDataset.from_text("To be, or not to be. " * 40, 16, tokenizer="bytes")
    config = TrainerConfig(output_dir=tmp_path, max_steps=1, micro_batch_size=2)
    model = GPTConfig(block_size=16, vocab_size=256, n_layer=1, n_head=1, n_embd=8)
    for resume in (False, True):
        display = ProgressDisplay(Console(force_jupyter=True))
        Trainer(model, data, config=config, callbacks=[display]).train(resume=resume)
    assert "already finished" in shown[-1]["text/plain"]
    assert "first step…" not in shown[-1]["text/html"]


SETUP = """
from pathlib import Path
from accelerate import notebook_launcher
from homebrew import Callback, GPTConfig, TokenDataset, Trainer, TrainerConfig

class Touch(Callback):
    def __init__(self, path):
        self.path = path

    def on_step_end(self, trainer):
        if trainer.step == 5 and trainer.is_main_process:
            self.path.touch()

def train(name, max_steps):
    data = TokenDataset.from_text("To be, or not to be. " * 40, 16, tokenizer="bytes")
    config = TrainerConfig(
        output_dir=folder / name, max_steps=max_steps, global_batch_tokens=64, log_every=1, eval_every=20
    )
    model = GPTConfig(block_size=16, vocab_size=256, n_layer=1, n_head=1, n_embd=8)
    Trainer(model, data, data, config=config, callbacks=[Touch(folder / f"{name}-runs")]).train()
"""
CELLS = {
    "launched": "notebook_launcher(train, args=('launched', 40), num_processes=2, use_port=port)",
    "launched-interrupted": (
        "notebook_launcher(train, args=('launched-interrupted', 10**6), num_processes=2, use_port=port)"
    ),
    "own": "train('own', 40)",
    "own-interrupted": "train('own-interrupted', 10**6)",
}


class RecordingClient(nbclient.NotebookClient):
    """Runs a notebook, and records the display messages of its cells."""

    def process_message(self, msg, cell, cell_index):
        if msg["msg_type"] in ("display_data", "update_display_data"):
            cell.setdefault("messages", []).append((msg["msg_type"], msg["content"]["transient"].get("display_id")))
        return super().process_message(msg, cell, cell_index)

    async def interrupt_once(self, path):
        """Interrupt the kernel once, as the notebook's button does, when the file exists."""
        while not path.exists():
            await asyncio.sleep(0.05)
        await self.km.interrupt_kernel()


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The cells of an executed notebook by name, and the folder of their runs."""
    folder = tmp_path_factory.mktemp("notebook")
    setup = f"import os; os.environ |= {ON_CPUS}; port = '{free_port()}'\n{SETUP}\nfolder = Path({str(folder)!r})"
    notebook = new_notebook(cells=[new_code_cell(source) for source in (setup, *CELLS.values())])
    client = RecordingClient(notebook, timeout=120, kernel_name="python3", allow_errors=True)

    async def execute():
        interrupts = [
            asyncio.create_task(client.interrupt_once(folder / f"{name}-runs"))
            for name in CELLS
            if "interrupted" in name
        ]
        await client.async_execute()
        for interrupt in interrupts:  # of cells that have failed
            interrupt.cancel()

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IPYTHONDIR", str(folder / "ipython"))
        asyncio.run(execute())
    return dict(zip(CELLS, notebook.cells[1:], strict=True)), folder


@pytest.mark.slow
@pytest.mark.parametrize("name", CELLS)
def test_a_run_is_one_output_that_is_updated(executed, name):
    cells, _ = executed
    (kind, display_id), *updates = cells[name]["messages"]
    assert kind == "display_data"
    assert display_id
    assert updates
    assert set(updates) == {("update_display_data", display_id)}
    (output,) = [output for output in cells[name].outputs if output.output_type == "display_data"]
    assert "polyline" in output.data["text/html"]
    last = "stopped early; resume to continue" if "interrupted" in name else "step 40 / 40"
    assert last in output.data["text/plain"]
    assert last in output.data["text/html"]
    if name == "own":
        assert len(cells[name].outputs) == 1
    assert "attempted to send message from fork" not in str(cells[name].outputs)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CELLS if "interrupted" in name])
def test_one_interrupt_saves_and_stops(executed, name):
    cells, folder = executed
    assert [output.ename for output in cells[name].outputs if output.output_type == "error"] == [
        "SignalException" if name.startswith("launched") else "KeyboardInterrupt"
    ]
    assert "Interrupt again to stop without saving" in str(cells[name].outputs)
    (checkpoint,) = (folder / name / "checkpoints").iterdir()
    assert int(checkpoint.name.removeprefix("step-")) >= 5
    assert (checkpoint / "manifest.json").exists()
