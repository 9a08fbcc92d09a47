"""What to call several runs in a legend: their folders, and what differs between their settings."""

import os
import re
from collections.abc import Sequence

from homebrew.metrics.run_settings import Settings
from homebrew.plotting.run_record import RunRecord

_COMPARED = ("config/", "model/", "train_dataset/", "mixed_precision", "device", "num_processes")
"""Beginnings of the names of settings that tell runs apart, the most telling first."""
_NOT_COMPARED = {
    "config/output_dir",
    "model/num_parameters",
    "train_dataset/fingerprint",
    "train_dataset/num_samples",
    "train_dataset/num_tokens",
}
"""Those that follow from others, or differ between all runs."""
_MAX_SETTINGS = 4
_MAX_CHARACTERS = 30
_NOT_XML = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def run_labels(runs: Sequence[RunRecord]) -> list[str]:
    """Return a label for each run, such as "a: optimizer=muon, seed=1"; for a single run, its name."""
    names = _unique_names(runs)
    differing = differing_settings([run.settings for run in runs if run.settings])
    labels = []
    for name, run in zip(names, runs, strict=True):
        given = [key for key in differing if key in run.settings]
        settings = [f"{key.rpartition('/')[2]}={_short(run.settings[key])}" for key in given[:_MAX_SETTINGS]]
        more = ["…"] if len(given) > _MAX_SETTINGS else []
        label = f"{name}: {', '.join(settings + more)}" if settings else name
        labels.append(printable(" ".join(label.split())))
    return labels


def differing_settings(settings: Sequence[Settings]) -> list[str]:
    """Return the names of the settings in which runs differ, the most telling first."""
    names = dict.fromkeys(name for run in settings for name in run)
    differing = [name for name in names if name not in _NOT_COMPARED and len({run.get(name) for run in settings}) > 1]
    return [name for beginning in _COMPARED for name in differing if name.startswith(beginning)]


def printable(text: str) -> str:
    """Replace the characters that XML cannot contain, such as those of file names that are not UTF-8."""
    return _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text)


def _unique_names(runs: Sequence[RunRecord]) -> list[str]:
    """Return the folders' names or, if two have the same name, their paths from where they differ."""
    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return names
    common = os.path.commonpath([run.folder for run in runs])
    return [os.path.relpath(run.folder, common) for run in runs]


def _short(value: float | str) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= _MAX_CHARACTERS else f"…{text[1 - _MAX_CHARACTERS :]}"
