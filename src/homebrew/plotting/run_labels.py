"""Labels of runs in a legend: their folders, and the settings that differ between them."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from homebrew.metrics.run_settings import Settings
from homebrew.plotting.run_record import RunRecord

_COMPARED = ("optimizer/class", "config/", "model/", "train_dataset/", "mixed_precision", "device", "num_processes")
"""Prefixes of the names of settings that distinguish runs, the most informative first."""
_NOT_COMPARED = frozenset(
    """
    config/output_dir config/log_every config/log_with config/eval_every config/eval_batches config/save_every
    config/keep_last config/keep_every config/gather_limit_bytes config/collective_timeout_seconds config/num_workers
    config/loader_timeout_seconds model/num_parameters train_dataset/fingerprint train_dataset/num_samples
    train_dataset/num_tokens train_dataset/source
    """.split()
)
"""Settings that follow from others, differ between all runs, or do not change what a run computes."""
_MAX_SETTINGS = 4
_MAX_VALUE, _MAX_NAME, _MAX_LABEL = 25, 50, 120
"""Maximum numbers of characters."""
_NOT_XML = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def run_names(runs: Sequence[RunRecord]) -> list[str]:
    """Return the folders' names or, if two have the same name, their paths from where they differ."""
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        folders = [Path(os.path.normpath(run.folder)) for run in runs]
        common = os.path.commonpath([folder.parent for folder in folders])  # a run's folder may be inside another's
        names = [os.path.relpath(folder, common) for folder in folders]
    return [_shortened(name, _MAX_NAME) for name in names]


def run_labels(runs: Sequence[RunRecord]) -> list[str]:
    """Return a label for each run, such as "a: optimizer=muon, seed=1"; for a single run, its name."""
    names = run_names(runs)
    differing: dict[str, str] = {}
    for key in differing_settings([run.settings for run in runs if run.settings]):
        differing.setdefault(_shown_name(key), key)  # of two settings with the same shown name, the more informative
    labels = []
    for name, run in zip(names, runs, strict=True):
        values = {shown: run.settings[key] for shown, key in differing.items() if key in run.settings}
        settings = [f"{shown}={_value(value)}" for shown, value in values.items()][:_MAX_SETTINGS]
        more = ["…"] if len(values) > _MAX_SETTINGS else []
        label = " ".join((f"{name}: {', '.join(settings + more)}" if settings else name).split())
        labels.append(printable(label if len(label) <= _MAX_LABEL else f"{label[: _MAX_LABEL - 1]}…"))
    return labels


def differing_settings(settings: Sequence[Settings]) -> list[str]:
    """Return the names of the settings in which runs differ, the most informative first."""
    names = dict.fromkeys(name for run in settings for name in run)
    differing = [name for name in names if name not in _NOT_COMPARED and len({run.get(name) for run in settings}) > 1]
    return [name for beginning in _COMPARED for name in differing if name.startswith(beginning)]


def printable(text: str) -> str:
    """Replace CR LF by newlines, and characters that are not safe in a terminal or not valid in XML."""
    return _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n"))


def _shown_name(key: str) -> str:
    return "optimizer" if key == "optimizer/class" else key.rpartition("/")[2]


def _value(value: float | str) -> str:
    return _shortened(f"{value:g}" if isinstance(value, float) else str(value), _MAX_VALUE)


def _shortened(text: str, length: int) -> str:
    """Shorten a text to its end, in which paths differ most."""
    return text if len(text) <= length else f"…{text[1 - length :]}"
