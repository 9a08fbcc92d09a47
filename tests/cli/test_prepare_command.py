import re
import shlex


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


def test_errors_are_in_terms_of_options(text, tmp_path, invoke_error):
    for option, value in (("--val-fraction", 1), ("--shard-tokens", 0), ("--workers", -1)):
        assert f"{option} {value}" in invoke_error("prepare", text, "--output", tmp_path / "a.npy", option, value)
    options = ("--output", tmp_path / "a.npy", "--tokenizer", "bytes", "--allow-special")
    assert "--allow-special needs" in invoke_error("prepare", text, *options)
