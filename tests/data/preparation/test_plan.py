"""Where the input is cut into parts: the ids do not change, and every document is in one split."""

import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from homebrew import get_tokenizer
from homebrew.data.preparation import plan
from homebrew.data.preparation.documents import read_documents
from homebrew.data.preparation.plan import plan_parts

TEXTS = st.text(st.sampled_from("ab's \n\t中é\u3000\u2028\x85🙂"), max_size=200)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("plan") / "text.txt"


@pytest.fixture
def part_bytes(monkeypatch):
    return lambda size: monkeypatch.setattr(plan, "PART_BYTES", size)


def cut(path, *, split=False):
    """Return the documents' texts in each part of a file, with a mark before those that continue."""
    return [
        [
            "…" * document.is_continued + "".join([document.text, *document.rest])
            for span in part.spans
            for document in read_documents(span, "text", split_at_end_of_text=split)
        ]
        for part in plan_parts([path], split_at_end_of_text=split)
    ]


@settings(max_examples=200)
@given(text=TEXTS, size=st.integers(1, 20))
def test_cutting_a_text_does_not_change_its_ids(path, text, size):
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "PART_BYTES", size)
        pieces = [piece.removeprefix("…") for part in cut(path) for piece in part]
    assert "".join(pieces) == text
    tokenizer = get_tokenizer("gpt2")
    assert [i for piece in pieces for i in tokenizer.encode(piece).tolist()] == tokenizer.encode(text).tolist()


def test_a_text_is_cut_before_white_space(path, part_bytes):
    path.write_text("To be, or not to be, that is")
    part_bytes(8)
    assert cut(path) == [["To be, or"], ["… not to be,"], ["… that", "… is"]]
    path.write_text("中文没有空格" * 100)
    assert cut(path) == [["中文没有空格" * 100]]


def test_a_text_is_cut_at_the_end_of_text_marker_if_it_separates_documents(path, part_bytes):
    path.write_text("To be,<|endoftext|>or not<|endoftext|>to be" + 9 * " x")
    part_bytes(8)
    assert cut(path, split=True) == [["To be,", "or not"], ["…", "to be" + 9 * " x"]]


def test_lines_of_json_are_not_cut(tmp_path, part_bytes):
    lines = [json.dumps({"text": f"{i} " * 5}) + "\n" for i in range(20)]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    part_bytes(100)
    parts = cut(tmp_path / "a.jsonl")
    assert len(parts) == 5
    assert [text for part in parts for text in part] == [f"{i} " * 5 for i in range(20)]


def test_small_files_share_a_part_and_compressed_ones_are_not_cut(tmp_path, part_bytes):
    for name in "abc":
        (tmp_path / name).write_text("x" * 40)
    (tmp_path / "d.gz").write_bytes(gzip.compress(bytes(range(32, 127)) * 9, compresslevel=0))
    part_bytes(100)
    parts = plan_parts([tmp_path / name for name in ("a", "b", "c", "d.gz")], split_at_end_of_text=False)
    assert [len(part.spans) for part in parts] == [2, 1, 1]
    assert [part.num_bytes for part in parts][:2] == [80, 40]
