import json
from html.parser import HTMLParser

import pytest

from homebrew.plotting.html_page import html_page
from homebrew.plotting.run_record import read_run

VOID = {"meta"}
HOSTILE = "<script>alert(1)</script>&\"'<img src=x onerror=y>"


class Page(HTMLParser):
    """The elements of a page, after checking that all are closed in order."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        self.open += [] if tag in VOID else [tag]

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)


def page(*folders, **options):
    return Page(html_page([read_run(folder) for folder in folders], **options))


def write_samples(folder, samples):
    events = [{"event": "sample", "step": step, "prompt": prompt, "text": text} for step, prompt, text in samples]
    (folder / "samples.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def test_a_page_has_the_curves_and_the_facts_of_a_real_run(killed_and_resumed):
    shown = page(killed_and_resumed)
    assert shown.tags.count("svg") == 4
    assert {killed_and_resumed.name, "6 of 6", "config/learning_rate", "0.01"} <= set(shown.text)
    assert "pre" not in shown.tags


def test_a_page_loads_nothing_and_has_no_duplicate_ids(record):
    shown = page(record("a", seed=1), record("b", seed=2))
    loading = [value for name, value in shown.attributes if name in ("src", "href", "xlink:href", "action", "data")]
    assert all(value.startswith("#") for value in loading)
    assert not {"script", "link", "img", "iframe", "object"} & set(shown.tags)
    ids = [value for name, value in shown.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert ("content", "width=device-width, initial-scale=1") in shown.attributes


def test_a_page_has_light_and_dark_colors(record):
    html = html_page([read_run(record("a"))])
    assert "prefers-color-scheme: dark" in html
    assert "currentColor" in html


def test_samples_are_shown_by_step_the_latest_first(record):
    folder = record("a")
    write_samples(folder, [(2, "RO", "ROMEO: early"), (2, "", "second"), (4, "other", "ROMEO: late")])
    text = page(folder).text
    assert text.index("Step 4") < text.index("Step 2")
    assert ["RO", "MEO: early"] == text[text.index("RO") :][:2]
    assert "ROMEO: late" in text


def test_of_many_samples_some_are_shown_the_last_among_them(record):
    folder = record("a")
    write_samples(folder, [(step, "", "text") for step in range(1, 1001)])
    headings = [text for text in page(folder).text if text.startswith("Step ")]
    assert 20 <= len(headings) <= 50
    assert headings[0] == "Step 1,000"


def test_text_of_a_run_is_never_markup(record):
    folder = record(HOSTILE.replace("/", "|"), note=HOSTILE, **{HOSTILE: 1})
    write_samples(folder, [(1, HOSTILE[:8], HOSTILE), (2, "", "\x00\ud800 </pre>")])
    shown = page(folder, record("b", note="other"))
    assert not {"script", "img"} & set(shown.tags)
    assert HOSTILE in shown.text
    assert HOSTILE[8:] in shown.text


@pytest.mark.parametrize(
    "events", [[{"event": "step", "step": 1}], [1, {"event": "evaluate", "step": 1, "loss": None}]]
)
def test_unknown_numbers_are_left_out(record, events):
    assert "Steps" in page(record("a", events)).text


def test_settings_that_differ_are_marked(record):
    shown = page(record("a", seed=1, optimizer="muon"), record("b", seed=2, optimizer="muon"))
    assert shown.attributes.count(("class", "differs")) == 1


def test_columns_and_samples_have_the_names_of_their_runs(record):
    folders = [record("a", seed=1), record("b", seed=2)]
    write_samples(folders[1], [(2, "RO", "ROMEO")])
    text = page(*folders).text
    assert text.count("a: seed=1") == 1  # in the legend; the labels are too wide for the tables on a phone
    assert {"a", "b", "Samples: b"} <= set(text)
