import re
import shlex

import numpy as np
import pytest

from homebrew.cli.prepare_command import is_near


def test_only_token_files_are_overwritten(text, tmp_path, invoke, invoke_error):
    before = text.read_bytes()
    assert str(text) in invoke_error("prepare", text, "--output", text, "--tokenizer", "bytes")
    assert text.read_bytes() == before
    tokens = tmp_path / "new" / "a.npy"
    for _ in range(2):
        invoke("prepare", text, "--output", tokens, "--tokenizer", "bytes")


def test_unusable_texts_are_rejected(text, tmp_path, invoke, invoke_error):
    tokens = tmp_path / "a.npy"
    invoke("prepare", text, "--output", tokens, "--tokenizer", "bytes")
    for path, message in ((tokens, "token file"), (tmp_path / "missing", "missing")):
        assert message in invoke_error("prepare", path, "--output", tmp_path / "b.npy")


def test_the_printed_command_trains_on_the_tokens(text, tmp_path, invoke, monkeypatch, tiny):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    text.rename(tmp_path / "texts" / "a.txt")
    output = invoke("prepare", "texts", "--output", "my book.npy", "--tokenizer", "bytes")
    words = shlex.split(re.search(r"homebrew (train .*)", output)[1])
    invoke(*words, *tiny, "--max-steps", 1)
    assert (tmp_path / "runs" / "my book" / "checkpoints").is_dir()


def test_the_printed_command_names_the_shards_of_both_splits(tmp_path, invoke, monkeypatch, tiny):
    monkeypatch.chdir(tmp_path)
    lines = "".join(f'{{"body": "{i}: to be, or not to be"}}\n' for i in range(200))
    (tmp_path / "a.jsonl").write_text(lines)
    options = ["--text-field", "body", "--val-fraction", 0.3, "--shard-tokens", 1000, "--workers", 2]
    output = invoke("prepare", "a.jsonl", "--output", "book.npy", "--tokenizer", "bytes", *options)
    words = shlex.split(re.search(r"homebrew (train .*)", output)[1])
    assert "book-train-*.npy" in words
    assert "book-val-*.npy" in words
    invoke(*words, *tiny, "--max-steps", 1)


def test_the_sizes_of_both_splits_are_printed(tmp_path, invoke, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{i}: to be"}}\n' for i in range(300)))
    output = invoke("prepare", "a.jsonl", "--output", "book.npy", "--tokenizer", "bytes", "--val-fraction", 0.4)
    sizes = [len(np.load(f"book-{split}.npy")) for split in ("train", "val")]
    pattern = r"book-{}.npy: ([\d,]+) tokens \((.*)%\) from (\d+) documents, "
    matches = [re.search(pattern.format(split), output) for split in ("train", "val")]
    assert [int(match[1].replace(",", "")) for match in matches] == sizes
    assert float(matches[1][2]) == pytest.approx(100 * sizes[1] / sum(sizes), abs=0.01)
    assert sum(int(match[3]) for match in matches) == 300
    assert "far from" not in output


def test_a_split_far_from_the_fraction_is_explained(tmp_path, invoke):
    (tmp_path / "a.txt").write_text("a " * 100)
    (tmp_path / "b.txt").write_text("b ")  # by its hash, the one for validation
    output = invoke(
        "prepare", tmp_path, "--output", tmp_path / "out.npy", "--tokenizer", "bytes", "--val-fraction", 0.4
    )
    assert "from 1 document," in output
    assert "far from --val-fraction 0.4" in output


@pytest.mark.parametrize(
    ("share", "expected", "result"),
    [(0.001, 0.001, True), (0.0019, 0.001, True), (0.0021, 0.001, False), (0.0004, 0.001, False), (0.96, 0.9, False)],
)
def test_shares_are_compared_by_their_ratio(share, expected, result):
    assert is_near(share, expected) is result


def test_wrong_values_are_errors(text, tmp_path, invoke_error):
    for option, value in (("--val-fraction", 1), ("--shard-tokens", 0), ("--workers", -1)):
        error = invoke_error("prepare", text, "--output", tmp_path / "a.npy", option, value)
        assert f"{option[2:].replace('-', '_')}={value}" in error
    options = ("--output", tmp_path / "a.npy", "--tokenizer", "bytes", "--allow-special")
    assert "allow_special" in invoke_error("prepare", text, *options)
