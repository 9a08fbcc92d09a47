"""Text files: what counts as text, in every function that reads one; and line endings."""

import bz2
import gzip
import lzma

import numpy as np
import pytest

from homebrew import TokenDataset, load_corpus, train_tokenizer
from homebrew.cli.main import main
from homebrew.data.preparation.prepare import prepare
from homebrew.data.text_file import read_text, text_chunks
from homebrew.data.token_file import TokenFile
from homebrew.errors import DataError

BINARY_FILES = {
    "uint16 ids of characters": np.tile(np.arange(1, 65, dtype=np.uint16), 50).tobytes(),
    "int64 ids": np.arange(60).tobytes(),
    "UTF-16 without a byte order mark": "To be, or not to be".encode("utf-16-le"),
    "uint16 ids of GPT-2": np.arange(0, 50_000, 7, dtype=np.uint16).tobytes(),
    "bzip2": bz2.compress(bytes(range(256)) * 9),
    "gzip": gzip.compress(bytes(range(256)) * 9, mtime=0),
    "a NUL at the end of a text": b"To be, or not to be\n" * 20 + b"\0",
}


@pytest.mark.parametrize("content", BINARY_FILES.values(), ids=BINARY_FILES)
@pytest.mark.parametrize(
    "read",
    [
        read_text,
        lambda path: load_corpus(path=path),
        lambda path: TokenDataset.from_file(path, 4, tokenizer="char"),
        lambda path: prepare([path], path.with_suffix(".npy"), tokenizer="bytes"),
        lambda path: list(text_chunks(path, 16)),
    ],
    ids=["read_text", "load_corpus", "from_file", "prepare", "text_chunks"],
)
def test_binary_files_are_not_text(tmp_path, read, content):
    path = tmp_path / "train.dat"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"^'.*train.dat' is a binary file"):
        read(path)


@pytest.mark.parametrize("content", [gzip.compress(b"To be", mtime=0), bz2.compress(b"To be"), lzma.compress(b"To be")])
def test_a_compressed_file_is_refused_with_advice(tmp_path, content):
    (tmp_path / "book.txt").write_bytes(content)
    with pytest.raises(DataError, match=r"(?i)book.txt' .*decompress|book.txt' is a binary file"):
        read_text(tmp_path / "book.txt")


@pytest.mark.parametrize(
    "read",
    [
        read_text,
        lambda path: load_corpus(path=path),
        lambda path: TokenDataset.from_file(path, 4, tokenizer="bytes"),
        lambda path: TokenDataset.from_file([path], 4, tokenizer="char"),
    ],
)
@pytest.mark.parametrize("device", ["/dev/zero", "/dev/full", "/dev/urandom"])
def test_a_device_without_an_end_raises(bounded_memory, read, device):
    with bounded_memory(), pytest.raises(DataError, match=device):
        read(device)


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("latin1", "café "),
        ("cp1252", "“café” "),
        ("shift_jis", "日本語テキスト"),
        ("gb18030", "漢字"),
        ("koi8-r", "Привет"),
    ],
)
def test_text_in_another_encoding_is_not_called_binary(tmp_path, encoding, text):
    path = tmp_path / "text"
    path.write_bytes((text * 20).encode(encoding))
    with pytest.raises(DataError, match=r"another encoding.*iconv"):
        read_text(path)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train {binary} --output-dir {run} --preset baby --max-steps 1", "is a binary file"),
        ("train {text} --output-dir {run} --preset baby --max-steps 1 --eval-data {binary}", "is a binary file"),
        ("prepare {text} {binary} --output {run}.npy", "is a binary file"),
        ("eval {run} --text {binary}", "is a binary file"),
        ("train {tokens} --output-dir {run} --preset baby --max-steps 1", "--tokenizer gpt2"),
        ("prepare {text} {tokens} --output {run}.npy", "is a token file"),
        ("eval {run} --text {tokens}", "is a binary file"),
    ],
)
def test_the_command_line_refuses_binary_files(tmp_path, capsys, command, message):
    (tmp_path / "text.txt").write_text("To be, or not to be.\n" * 200)
    for name in ("train.dat", "train.bin"):
        (tmp_path / name).write_bytes(BINARY_FILES["uint16 ids of characters"])
    names = {"text": "text.txt", "binary": "train.dat", "tokens": "train.bin", "run": "run"}
    assert main(command.format(**{key: tmp_path / name for key, name in names.items()}).split()) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("run*"))


@pytest.mark.parametrize("text", ["To be\x1a", "\x1b[1mbold\x1b[0m \x08\x07\x0c", "a\x7f" + 20 * "b", "中文\x85\u2028"])
def test_text_with_control_characters_is_text(tmp_path, text):
    text = 10 * "plain " + text
    (tmp_path / "text").write_bytes(text.encode())
    assert read_text(tmp_path / "text") == text


@pytest.mark.parametrize("text", ["a\r\nb\r\n", "a\rb\n", "\r\r\n\n", "a\x85b\u2028c\x0b\x0c"])
@pytest.mark.parametrize("tokenizer", ["bytes", "char", "gpt2"])
def test_line_endings_are_not_translated(tmp_path, text, tokenizer):
    path = tmp_path / "text"
    path.write_bytes(text.encode() * 9)
    assert load_corpus(path=path).text == text * 9
    direct = TokenDataset.from_file(path, 2, tokenizer=tokenizer)
    ids = direct.tokenizer.encode(text * 9).tolist()
    assert direct.tokens.ids.tolist() == ids
    prepare([path], tmp_path / "out.npy", tokenizer=tokenizer)
    prepared = TokenFile(tmp_path / "out.npy")
    assert prepared.read(0, len(prepared)).tolist() == ids
    assert prepared.metadata.num_text_bytes == len(text.encode() * 9)


@pytest.mark.parametrize("name", ["book.jsonl", "book.NDJSON", "book.json"])
@pytest.mark.parametrize(
    "read",
    [
        lambda path: TokenDataset.from_file(path, 8, tokenizer="bytes"),
        lambda path: load_corpus(path=path),
        lambda path: train_tokenizer(path, path.parent / "own.json", vocab_size=300),
        lambda path: train_tokenizer([path.parent / "a.txt", path], path.parent / "own.json", vocab_size=300),
    ],
)
def test_json_lines_are_not_read_as_text(tmp_path, name, read):
    (tmp_path / "a.txt").write_text("To be, or not to be")
    (tmp_path / name).write_text('{"text": "To be, or not to be"}\n' * 20)
    with pytest.raises(DataError, match=rf"{name}' has JSON. Write its texts to a .txt file or, .*homebrew prepare"):
        read(tmp_path / name)
    assert not (tmp_path / "own.json").exists()
