"""A page about runs: curves, a summary, samples and settings. It is one file without scripts or external resources."""

import math
from collections.abc import Sequence
from html import escape
from itertools import groupby

import numpy as np

from homebrew.metrics.step_metrics import TextSample
from homebrew.plotting.curve_points import smoothed
from homebrew.plotting.curves import COLORS, DASHES, panel_svg
from homebrew.plotting.panels import PANELS
from homebrew.plotting.run_labels import differing_settings, printable, run_labels, run_names
from homebrew.plotting.run_record import RunRecord, XAxis

_MAX_SAMPLED_STEPS = 50

_STYLE = """
:root { color-scheme: light dark; --text: #1f2328; --page: #fff; --card: #f6f8fa; --line: #d0d7de; --quiet: #59636e }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6edf3; --page: #0d1117; --card: #161b22; --line: #30363d; --quiet: #9198a1 }
}
body { margin: 0 auto; max-width: 76rem; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif; color: var(--text);
  background: var(--page); overflow-wrap: anywhere }
h1 { font-size: 1.5rem } h2 { font-size: 1.2rem; margin-top: 2rem } h3 { font-size: 1rem; margin: 1.2rem 0 .3rem }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); gap: 1rem }
.curves svg { display: block; width: 100%; height: auto }
.legend { list-style: none; padding: 0 } .legend li { display: flex; align-items: baseline }
.legend svg { flex: none; width: 2rem; height: .8rem; margin-right: .5rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top;
  overflow-wrap: normal }
th { font-weight: normal; color: var(--quiet) } tr.differs td { font-weight: bold }
pre { margin: .3rem 0; padding: .7rem; border-radius: .4rem; background: var(--card); white-space: pre-wrap;
  font-size: .85rem }
summary { cursor: pointer }
"""


def html_page(runs: Sequence[RunRecord], *, x: XAxis = "steps", log_x: bool = False) -> str:
    """Return the page.

    Args:
        runs: One or more runs.
        x: Unit of the x-axis.
        log_x: Whether the x-axis is logarithmic.

    Raises:
        ConfigError: matplotlib is not installed, or there are too many runs.
    """
    names = run_names(runs)
    title = _text(" · ".join(names))
    curves = "\n".join(f"<div>{panel_svg(panel, runs, x=x, log_x=log_x)}</div>" for panel in PANELS)
    samples = "\n".join(_samples(run, name, is_only=len(runs) == 1) for run, name in zip(runs, names, strict=True))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{title}</h1>
{_legend(run_labels(runs)) if len(runs) > 1 else ""}
<div class="curves">
{curves}
</div>
<h2>Summary</h2>
{_table([_summary(run) for run in runs], names)}
{samples}
<h2>Settings</h2>
<details><summary>run.json</summary>
{_table([{name: str(value) for name, value in run.settings.items()} for run in runs], names, bold=_differing(runs))}
</details>
</body>
</html>
"""


def _legend(labels: Sequence[str]) -> str:
    items = []
    for index, label in enumerate(labels):
        dash = DASHES[index // len(COLORS)]
        lengths = "" if isinstance(dash, str) else " ".join(str(3 * length) for length in dash[1])
        color = COLORS[index % len(COLORS)]
        line = f'<line x2="32" y1="6" y2="6" stroke="{color}" stroke-width="3" stroke-dasharray="{lengths}"/>'
        items.append(f'<li><svg viewBox="0 0 32 12" aria-hidden="true">{line}</svg>{_text(label)}</li>')
    return f'<ul class="legend">{"".join(items)}</ul>'


def _summary(run: RunRecord) -> dict[str, str]:
    """Return the summary of a run: names of a few numbers and their values."""
    last = {name: float(run.steps[name][-1]) for name in ("step", "num_tokens", "elapsed_seconds")}
    max_steps = run.settings.get("config/max_steps")
    of_all = f" of {max_steps:,}" if isinstance(max_steps, int) else ""
    minutes, seconds = divmod(_whole(last["elapsed_seconds"]), 60)
    summary = {
        "Steps": f"{_whole(last['step']):,}{of_all}",
        "Tokens": f"{_whole(last['num_tokens']):,}",
        "Training time": f"{minutes // 60}:{minutes % 60:02}:{seconds:02}",
        "Training loss, smoothed": f"{smoothed(run.steps['loss'])[-1]:.4f}",
    }
    losses = run.evaluations["loss"]
    if np.isfinite(losses).any():
        best = int(np.nanargmin(losses))
        summary["Validation loss"] = f"{losses[-1]:.4f}"
        summary["Best validation loss"] = f"{losses[best]:.4f} at step {run.evaluations['step'][best]:,.0f}"
    speeds = run.steps["tokens_per_second"]
    summary["Tokens/s, median"] = f"{np.median(speeds[np.isfinite(speeds)]):,.0f}" if np.isfinite(speeds).any() else ""
    if len(run.skipped):
        summary["Skipped steps"] = f"{len(run.skipped):,}"
    if len(run.resumes):
        summary["Resumed from step"] = ", ".join(f"{step:,.0f}" for step in run.resumes["step"])
    return summary


def _whole(value: float) -> int:
    return int(value) if math.isfinite(value) else 0


def _differing(runs: Sequence[RunRecord]) -> Sequence[str]:
    return differing_settings([run.settings for run in runs])


def _table(columns: Sequence[dict[str, str]], names: Sequence[str], *, bold: Sequence[str] = ()) -> str:
    """Return a table with a row for each name, and a column for each run. The rows named in `bold` are emphasized."""
    rows = []
    if len(columns) > 1:
        cells = "".join(f'<th scope="col">{_text(run)}</th>' for run in names)
        rows.append(f"<tr><td></td>{cells}</tr>")
    for name in dict.fromkeys(name for column in columns for name in column):
        cells = "".join(f"<td>{_text(column.get(name, ''))}</td>" for column in columns)
        row_class = ' class="differs"' if name in bold else ""
        rows.append(f'<tr{row_class}><th scope="row">{_text(name)}</th>{cells}</tr>')
    return f'<div class="wide"><table>{"".join(rows)}</table></div>'


def _samples(run: RunRecord, name: str, *, is_only: bool) -> str:
    """Return the samples of a run by step, the latest first. If there are too many steps, every nth is shown."""
    by_step = [(step, list(samples)) for step, samples in groupby(run.samples, key=lambda sample: sample.step)]
    if not by_step:
        return ""
    parts = ["<h2>Samples</h2>" if is_only else f"<h2>Samples: {_text(name)}</h2>"]
    by_step.reverse()
    stride = -(-len(by_step) // _MAX_SAMPLED_STEPS)
    if stride > 1:
        parts.append(f"<p>Samples of {len(by_step[::stride])} of {len(by_step)} steps.</p>")
    for step, samples in by_step[::stride]:
        parts += [f"<h3>Step {step:,}</h3>", *map(_sample, samples)]
    return "\n".join(parts)


def _sample(sample: TextSample) -> str:
    prompt = sample.prompt if sample.text.startswith(sample.prompt) else ""
    return f"<pre><b>{_text(prompt)}</b>{_text(sample.text[len(prompt) :])}</pre>"


def _text(text: str) -> str:
    return escape(printable(text))
