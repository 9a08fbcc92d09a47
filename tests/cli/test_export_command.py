def test_export_without_tokenizer(run, invoke, invoke_error, tmp_path):
    invoke("export", run, tmp_path, "--no-tokenizer")
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    greedy = ["--prompt", "Hello", "--temperature", 0, "--max-new-tokens", 10]
    assert "pass --tokenizer" in invoke_error("sample", tmp_path, *greedy)
    assert invoke("sample", tmp_path, *greedy, "--tokenizer", "bytes") == invoke("sample", run, *greedy)
