import json
import re

import pytest
from transformers import pipeline


def test_prepare_train_sample_eval_and_export(invoke, text, tmp_path, tiny):
    """The commands in the order a user runs them, with GPT-2's tokenizer."""
    tokens, run, exported = tmp_path / "text.npy", tmp_path / "run", tmp_path / "exported"

    output = invoke("prepare", text, "--output", tokens, "--tokenizer", "gpt2")
    assert f"{text.stat().st_size:,} bytes" in output

    output = invoke("train", tokens, "--output-dir", run, "--max-steps", 30, "--learning-rate", 0.01, *tiny)
    assert "step 30/30" in output
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [event["loss"] for event in events if event["event"] == "step"]
    assert losses[-1] < 0.8 * losses[0]

    greedy = ["--prompt", "ROMEO:", "--temperature", 0, "--max-new-tokens", 10]
    sample = invoke("sample", run, *greedy)
    assert sample.startswith("ROMEO:")
    assert len(sample) > len("ROMEO:\n")

    output = invoke("eval", run, "--text", text)
    loss = float(re.search(r"^loss +([\d.]+)$", output, re.MULTILINE)[1])
    assert loss == pytest.approx(losses[-1], rel=0.2)

    invoke("export", run, exported)
    generate = pipeline("text-generation", str(exported), device="cpu")
    assert generate("ROMEO:", max_new_tokens=10, do_sample=False)[0]["generated_text"] + "\n" == sample
    assert invoke("sample", exported, *greedy) == sample
