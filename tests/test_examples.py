import subprocess
import sys
from pathlib import Path

from homebrew import GPT, GPTConfig
from homebrew.model.adapters import load_adapter

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_finetune_lora(tmp_path):
    base, text, out = tmp_path / "base", tmp_path / "text.txt", tmp_path / "run"
    GPT(GPTConfig(block_size=32, n_layer=1, n_head=1, n_embd=16)).save_pretrained(base)
    text.write_text("It is the east, and Juliet is the sun.\n" * 60)
    options = ["--base", base, "--text", text, "--output-dir", out, "--max-steps", 2, "--block-size", 16]
    done = subprocess.run(
        [sys.executable, EXAMPLES / "finetune_lora.py", *map(str, options)], capture_output=True, text=True, check=True
    )
    assert "ROMEO:" in done.stdout
    model = GPT.from_pretrained(base)
    load_adapter(model, out / "adapter")
