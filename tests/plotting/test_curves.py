import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from homebrew.errors import ConfigError
from homebrew.plotting.curves import MAX_RUNS, curves_image, panel_svg
from homebrew.plotting.panels import LOSS
from homebrew.plotting.run_record import RunRecord, read_run

PANELS = ["loss", "learning rate", "gradient norm", "tokens/s"]


def texts(svg):
    """Return the texts of an SVG picture."""
    return [element.text for element in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def draw(*folders, **options):
    return texts(curves_image([read_run(folder) for folder in folders], kind="svg", **options))


def test_a_real_run_is_drawn_with_all_panels_and_marks(killed_and_resumed):
    drawn = draw(killed_and_resumed)
    titles = [text.lower() for text in drawn]
    assert all(any(title.startswith(panel) for title in titles) for panel in PANELS)
    assert {"training", "validation", "resumed", "steps", killed_and_resumed.name} <= set(drawn)


def test_only_what_a_run_has_is_explained(record):
    assert not {"validation", "resumed", "1 skipped"} & set(draw(record("a")))
    assert "1 skipped" in draw(record("b", [1, {"event": "step_skipped", "step": 2, "loss": None}, 3]))


def test_several_runs_have_a_legend_of_what_differs(record):
    drawn = draw(*(record(f"_{seed}", seed=seed) for seed in range(3)))
    assert [text.strip() for text in drawn if "seed" in text] == [f"_{seed}: seed={seed}" for seed in range(3)]


@pytest.mark.parametrize(("lowest", "ratio"), [(0.012, 20), (0.3, 1e5), (1.05, 2.1), (1.3, 7), (2.5, 2.1)])
def test_a_logarithmic_axis_has_a_few_ticks(record, lowest, ratio):
    folder = record("a", [{"event": "step", "step": i + 1, "loss": lowest * ratio ** (1 - i)} for i in range(2)])
    picture = ET.fromstring(curves_image([read_run(folder)], kind="svg"))
    loss = picture.find(".//*[@id='axes_1']")
    labels = [tick.find(".//{*}text").text for tick in loss.iter() if tick.get("id", "").startswith("ytick")]
    assert 2 <= len(labels) <= 6
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize(("x", "label"), [("steps", "steps"), ("tokens", "tokens"), ("seconds", "seconds of training")])
@pytest.mark.parametrize("log_x", [False, True])
def test_every_x_axis(record, x, label, log_x):
    assert draw(record("a"), x=x, log_x=log_x).count(label) == len(PANELS)


def test_long_runs_are_measured_in_minutes_and_hours(record):
    for seconds, unit in ((600, "minutes"), (90_000, "hours")):
        folder = record(unit, [1, {"event": "step", "step": 2, "loss": 1.0, "elapsed_seconds": seconds}])
        assert f"{unit} of training" in draw(folder, x="seconds")


@pytest.mark.parametrize(
    "events",
    [
        [1],
        [{"event": "step", "step": 1, "loss": None}],
        [{"event": "step", "step": step, "loss": 0.0, "grad_norm": 0, "learning_rate": 0} for step in (1, 2, 3)],
        [{"event": "step", "step": step, "loss": -step, "tokens_per_second": 1e299} for step in (1, 2, 3)],
        [1, {"event": "evaluate", "step": 9, "loss": None}, {"event": "resume", "step": 1}, 3],
    ],
    ids=["one step", "no finite loss", "zeros", "extreme values", "an evaluation that is not finite"],
)
def test_unusual_runs_are_drawn(record, events):
    folder = record("a", events)
    for log_x in (False, True):
        assert draw(folder, log_x=log_x)


@pytest.mark.parametrize("name", ["$x_1$ and $\\frac$", "_hidden", "<b>&", "書", "two\nlines", "\udcff"])
def test_any_name_can_be_drawn(record, name):
    first, second = record(name, seed=1), record("other", seed=2)
    assert any("seed=1" in text for text in draw(first, second))


def test_a_picture_is_a_png_of_a_readable_size(record):
    png = curves_image([read_run(record("a"))])
    assert png.startswith(b"\x89PNG")
    width, height = (int.from_bytes(png[start : start + 4], "big") for start in (16, 20))
    assert width >= 1200
    assert height >= 600


@pytest.mark.parametrize("log_x", [False, True])
def test_a_long_noisy_run_is_a_small_picture(record, log_x):
    steps = read_run(record("a")).steps
    steps.cut(0)
    losses = 1 + np.random.default_rng(0).random(300_000)
    for index, loss in enumerate(losses.tolist()):
        steps.append(index + 1, loss, 1e-3, loss, loss, index, index)
    assert len(curves_image([RunRecord(Path("a"), steps=steps)], kind="svg", log_x=log_x)) < 500_000


def test_a_panel_has_the_text_color_of_the_page(record):
    svg = panel_svg(LOSS, [read_run(record("a"))])
    assert svg.startswith("<svg")
    assert "currentColor" in svg
    assert not re.search(r"(fill|stroke): ?(#000000|black|#ffffff)", svg)


def test_neither_pyplot_nor_settings_of_matplotlib_are_used_or_changed(record, monkeypatch):
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    run = read_run(record("a"))
    expected = panel_svg(LOSS, [run])
    with matplotlib.rc_context({"lines.linewidth": 30, "text.usetex": True, "axes.facecolor": "black"}):
        before = matplotlib.rcParams.copy()
        assert panel_svg(LOSS, [run]) == expected
        assert matplotlib.rcParams.copy() == before
    assert "matplotlib.pyplot" not in sys.modules


def test_a_missing_matplotlib_is_an_error_that_says_how_to_install_it(record, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match="pip install matplotlib"):
        curves_image([read_run(record("a"))])


def test_too_many_runs_are_an_error_and_as_many_as_allowed_are_drawn(record):
    runs = [read_run(record(f"run-{number}", [1, 2], seed=number)) for number in range(MAX_RUNS + 1)]
    assert curves_image(runs[:MAX_RUNS])
    with pytest.raises(ConfigError, match=f"at most {MAX_RUNS}"):
        curves_image(runs)
