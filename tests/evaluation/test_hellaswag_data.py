import json

import pytest

from homebrew.errors import DataError
from homebrew.evaluation.hellaswag_data import Question, load_hellaswag

GOOD = {"ind": 24, "ctx": "A man is on a roof. he", "endings": ["a", "b", "c", "d"], "label": 3, "split": "val"}


def test_lines_are_questions_and_empty_ones_nothing(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n\n{json.dumps(GOOD | {'label': 0})}\n")
    assert load_hellaswag(path) == [Question(GOOD["ctx"], ("a", "b", "c", "d"), label) for label in (3, 0)]


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"\xff",
        b"[" * 100_000,
        b"[]",
        *(
            json.dumps(GOOD | changes).encode()
            for changes in (
                {"ctx": ""},
                {"ctx": 1},
                {"endings": ["a", "b", "c"]},
                {"endings": ["a", "b", "c", 4]},
                {"endings": "abcd"},
                {"label": 4},
                {"label": True},
                {"label": "3"},
                {"label": None},
            )
        ),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line):
    path = tmp_path / "questions.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + line)
    with pytest.raises(DataError, match=r"questions\.jsonl, line 2"):
        load_hellaswag(path)


def test_a_file_without_questions_or_none_at_all(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="no questions"):
        load_hellaswag(tmp_path / "empty.jsonl")
    with pytest.raises(DataError, match=r"none\.jsonl.*https://"):
        load_hellaswag(tmp_path / "none.jsonl")


def test_another_file_in_the_cache_is_not_taken_for_hellaswag(tmp_path, monkeypatch):
    monkeypatch.setenv("HOMEBREW_GPT_CACHE", str(tmp_path))
    monkeypatch.setattr("homebrew.evaluation.hellaswag_data.download", lambda *_: None)  # as without a network
    (tmp_path / "hellaswag_val.jsonl").write_text(json.dumps(GOOD))
    with pytest.raises(DataError, match="neither at"):
        load_hellaswag()
