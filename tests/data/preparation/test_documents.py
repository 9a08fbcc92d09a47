"""Documents in files of every format: their texts, and errors that name the file and the line or row."""

import gzip
import io
import json
import re
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from homebrew.data.gpt2_vocabulary import END_OF_TEXT
from homebrew.data.preparation import documents as documents_module
from homebrew.data.preparation.documents import Span, _split, read_documents
from homebrew.errors import DataError

TEXTS = ["To be, or not to be:\n", "", "that is the question —\r\n", "中文 🙂\u2028\0", "<|endoftext|>"]


def zstd(data):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def jsonl(texts, field="text"):
    lines = [json.dumps({"id": 1, field: text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(texts)]
    return "\n".join([*lines[:1], " ", *lines[1:]]).encode()  # a blank line, and no line end at the end


def parquet(texts, field="text", kind=None, **options):
    sink = io.BytesIO()
    pq.write_table(pa.table({"id": range(len(texts)), field: pa.array(texts, kind)}), sink, **options)
    return sink.getvalue()


def read(path, field="text", split=False, start=0, stop=None):
    documents = read_documents(Span(str(path), start, stop), field, split_at_end_of_text=split)
    return ["".join([document.text, *document.rest]) for document in documents]


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("a.txt", TEXTS[2].encode(), TEXTS[2:3]),
        ("a.md", b"", [""]),
        ("a.py", TEXTS[0].encode(), TEXTS[:1]),
        ("no_suffix", TEXTS[0].encode(), TEXTS[:1]),
        ("a.gz", gzip.compress(TEXTS[0].encode(), mtime=0), TEXTS[:1]),
        ("a.txt.gz", gzip.compress(b"To be", mtime=0) + gzip.compress(b", or not", mtime=0), ["To be, or not"]),
        ("a.MD.ZST", zstd(TEXTS[2].encode()), TEXTS[2:3]),
        ("a.zst", zstd(b"To be") + zstd(b", or not"), ["To be, or not"]),
        ("a.jsonl", jsonl(TEXTS), TEXTS),
        ("a.JSONL", jsonl(TEXTS) + b"\n\n", TEXTS),
        ("a.jsonl.gz", gzip.compress(jsonl(TEXTS), mtime=0), TEXTS),
        ("a.v1.jsonl.zst", zstd(jsonl(TEXTS)), TEXTS),
        ("a.parquet", parquet(TEXTS), TEXTS),
        ("a.parquet", parquet(TEXTS, row_group_size=2, compression="zstd"), TEXTS),
        ("a.parquet", parquet(TEXTS, kind=pa.large_string()), TEXTS),
        ("a.parquet", parquet(TEXTS, kind=pa.dictionary(pa.int32(), pa.string())), TEXTS),
    ],
)
def test_texts_of_each_format(tmp_path, name, content, texts):
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path / name) == texts


@pytest.mark.parametrize(("name", "make"), [("a.jsonl", jsonl), ("a.parquet", parquet)])
def test_the_text_may_be_in_any_field(tmp_path, name, make):
    (tmp_path / name).write_bytes(make(TEXTS, field="my content"))
    assert read(tmp_path / name, field="my content") == TEXTS


GOOD = b'{"text": "To be"}\n'
BAD_FILES = {
    "not JSON": ("a.jsonl", GOOD + b'{"text": "or not\n', r"line 2 is not valid.*column"),
    "a list": ("a.jsonl", GOOD + b"\n[1]", "line 3 is not valid: it is a list"),
    "a missing field": ("a.jsonl", b'{"body": "To be"}', r"line 1 .*no field 'text', but 'body'.*text_field"),
    "null": ("a.jsonl", GOOD * 2 + b'{"text": null}', "line 3 .*'text' is null"),
    "a number": ("a.jsonl", b'{"text": 3}', "line 1 .*'text' is a int, not a string"),
    "not UTF-8": ("a.jsonl", GOOD + b'{"text": "\xff"}', "line 2 is not UTF-8"),
    "a surrogate": ("a.jsonl", GOOD + rb'{"text": "\ud800"}', r"line 2 .*U\+D800"),
    "deep nesting": ("a.jsonl", b'{"text": ' + b"[" * 100_000, "line 1 is not valid"),
    "compressed lines": ("a.jsonl.gz", gzip.compress(GOOD + b"{}", mtime=0), "line 2 .*no field"),
    "text that is not UTF-8": ("a.txt", b"To be\nor \xe9", "line 2, byte 9"),
    "compressed text that is not UTF-8": ("a.zst", zstd(b"To be\nor \xe9t"), "line 2, byte 9"),
    "a character cut off": ("a.txt", "To be\n中".encode()[:-1], "line 2, byte 6"),
    "truncated gzip": ("a.gz", gzip.compress(b"To be" * 99, mtime=0)[:-9], "cannot be read.*ended before"),
    "corrupt gzip": ("a.gz", gzip.compress(b"To be" * 99, mtime=0)[:20] + bytes(20), "cannot be read"),
    "no gzip": ("a.gz", b"To be", "cannot be read: Not a gzipped file"),
    "truncated zstd": ("a.zst", zstd(b"To be" * 99)[:-3], "cannot be read: Truncated"),
    "no zstd": ("a.zst", b"To be, or not to be", "cannot be read: ZSTD"),
    "binary in gzip": ("a.gz", gzip.compress(b"To be\0", mtime=0), "is a binary file"),
    "no Parquet": ("a.parquet", b"To be, or not to be", "cannot be read: Parquet"),
    "truncated Parquet": ("a.parquet", parquet(TEXTS)[:-20], "cannot be read"),
    "a missing column": ("a.parquet", parquet(TEXTS, field="body"), "no column 'text', but 'id', 'body'.*text_field"),
    "a column of numbers": ("a.parquet", parquet([1, 2]), "row 0 .*it is a int, not a string"),
    "a null row": ("a.parquet", parquet(["To be"] * 300 + [None], row_group_size=7), "row 300 .*it is null"),
    "compressed Parquet": ("a.parquet.gz", b"", "compressed Parquet file"),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_input_raises_an_error_that_names_the_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"(?s){re.escape(str(tmp_path / name))}'.*{message}"):
        read(tmp_path / name)


def test_lines_and_rows_are_counted_from_the_start_of_the_file(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(GOOD * 5 + b"{}")
    (tmp_path / "a.txt").write_bytes(b"To be\n" * 5 + b"\xff")
    (tmp_path / "a.parquet").write_bytes(parquet(["To be"] * 5 + [None], row_group_size=2))
    for name, start, place in (("a.jsonl", 2 * len(GOOD), "line 6"), ("a.txt", 12, "line 6, byte 30")):
        with pytest.raises(DataError, match=place):
            read(tmp_path / name, start=start)
    with pytest.raises(DataError, match="row 5"):
        read(tmp_path / "a.parquet", start=2)


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.zst"])
def test_a_missing_library_is_named(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=rf"{name}.*pyarrow"):
        read(tmp_path / name)


@pytest.mark.parametrize("file", ["a.txt", "a.jsonl"])
def test_texts_are_split_at_the_end_of_text_marker_on_request(tmp_path, monkeypatch, file):
    monkeypatch.setattr("homebrew.data.text_file._BLOCK_BYTES", 5)
    text = f"{END_OF_TEXT}To be,{END_OF_TEXT}{END_OF_TEXT}<|endoftext|or not{END_OF_TEXT}"
    (tmp_path / file).write_bytes(text.encode() if file == "a.txt" else jsonl([text]))
    assert read(tmp_path / file, split=True) == text.split(END_OF_TEXT)
    assert read(tmp_path / file) == [text]


@given(st.lists(st.text("ab<|endoftext>", max_size=30) | st.just(END_OF_TEXT), max_size=8))
def test_pieces_do_not_depend_on_the_chunks(chunks):
    assert ["".join(piece) for piece in _split(iter(chunks))] == "".join(chunks).split(END_OF_TEXT)


PRETTY = b'[\n  {\n    "text": "To be"\n  }\n]'


@pytest.mark.parametrize("name", ["a.json", "a.JSON", "a.ndjson", "c4.json.gz", "c4.00000.ndjson.gz", "a.json.zst"])
def test_other_names_of_json_lines(tmp_path, name):
    compress = {"gz": lambda data: gzip.compress(data, mtime=0), "st": zstd}.get(name[-2:], bytes)
    (tmp_path / name).write_bytes(compress(jsonl(TEXTS)))
    assert read(tmp_path / name) == TEXTS
    for content, place in ((PRETTY, "line 1"), (PRETTY[2:], "line 1"), (b'[{"text": "To be"}]', "line 1"), (b"x", "1")):
        (tmp_path / name).write_bytes(compress(content))
        with pytest.raises(DataError, match=rf"{place} is not valid.* one object per line"):
            read(tmp_path / name)


@pytest.mark.parametrize("options", [{}, {"row_group_size": 7}, {"use_dictionary": False}])
@pytest.mark.parametrize(("length", "limit"), [(3000, 2), (300, 10), (0, 20)])
def test_parquet_rows_are_read_in_batches_of_bounded_size(tmp_path, monkeypatch, options, length, limit):
    monkeypatch.setattr(documents_module, "_BATCH_ROWS", 20)
    monkeypatch.setattr(documents_module, "_BATCH_BYTES", 3000)
    texts = [f"{i:02}" + chr(97 + i % 26) * length for i in range(50)]
    (tmp_path / "a.parquet").write_bytes(parquet(texts, compression="none", **options))
    sizes = []
    iter_batches = pq.ParquetFile.iter_batches

    def recording(self, batch_size, **arguments):
        sizes.append(batch_size)
        return iter_batches(self, batch_size, **arguments)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", recording)
    assert read(tmp_path / "a.parquet") == texts
    assert 1 <= max(sizes) <= limit
