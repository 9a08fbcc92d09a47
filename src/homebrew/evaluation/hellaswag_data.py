"""HellaSwag (Zellers et al. 2019): a situation and four endings, one of which is how it went on."""

import json
from dataclasses import dataclass
from pathlib import Path

from homebrew.data.download import cache_dir, checked, download, read_file
from homebrew.errors import DataError

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
_SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
NUM_ENDINGS = 4


@dataclass(frozen=True)
class Question:
    """A line of HellaSwag."""

    context: str
    endings: tuple[str, ...]
    """Four."""
    label: int
    """Which of them is right, from 0."""


def load_hellaswag(path: str | Path | None = None) -> list[Question]:
    """HellaSwag's 10,042 validation questions, from the cache or the network; or those of a file.

    Args:
        path: a file of JSON lines with `ctx`, `endings` and `label`, to read instead.

    Raises:
        DataError: the file cannot be had, or a line is malformed; the message names the line.
    """
    if path is not None:
        if (data := read_file(Path(path))) is None:
            raise DataError(f"{str(path)!r} cannot be read. HellaSwag's validation file is at {URL}.")
        return _parse(data, str(path))
    cached = cache_dir() / "hellaswag_val.jsonl"
    data = checked(read_file(cached), _SHA256) or download(URL, _SHA256, cached)
    if data is None:
        raise DataError(
            f"HellaSwag is neither at {cached} nor could it be downloaded. Connect to the network, or fetch {URL} "
            f"elsewhere and give its path."
        )
    return _parse(data, str(cached))


def _parse(data: bytes, name: str) -> list[Question]:
    questions = [
        _question(line, f"{name}, line {number}")
        for number, line in enumerate(data.split(b"\n"), start=1)
        if line.strip()
    ]
    if not questions:
        raise DataError(f"{name} holds no questions.")
    return questions


def _question(line: bytes, where: str) -> Question:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise DataError(f"{where} must be a JSON object; it is a {type(value).__name__}.")
    context, endings, label = value.get("ctx"), value.get("endings"), value.get("label")
    if not isinstance(context, str) or not context:
        raise DataError(f"{where}: ctx={context!r} must be a text that is not empty.")
    if not (
        isinstance(endings, list) and len(endings) == NUM_ENDINGS and all(isinstance(ending, str) for ending in endings)
    ):
        raise DataError(f"{where}: endings={endings!r} must be {NUM_ENDINGS} texts.")
    if type(label) is not int or not 0 <= label < NUM_ENDINGS:
        raise DataError(
            f"{where}: label={label!r} must be a number from 0 to {NUM_ENDINGS - 1}. (HellaSwag's test file has none: "
            f"use the validation file.)"
        )
    return Question(context, tuple(endings), label)
